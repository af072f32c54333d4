# Sends every kind of interprocessor interrupt between CPUS processors, ROUNDS times each, and counts what arrives.
# COM1 gets a letter per kind that was complete, then "IPI DONE", or "IPI FAIL" after the letter of the kind that was
# not; then the machine is reset by the keyboard controller.
# Symbols, which may be set from outside: CPUS (2 … 32), ROUNDS, NMIS (how many of them; 1 where nothing can return from
# one, see smp.inc), RESTARTS (how often each processor is started again), XAPIC (see smp.inc) and BROADCAST (0: without
# the destination that is all processors, physical).
        .include "smp.inc"
        default ROUNDS, 100
        default NMIS, 1
        default RESTARTS, 1
        default BROADCAST, 1

        .if     CPUS < 16
        .set    CLUSTER, CPUS           # as many processors are in cluster 0
        .else
        .set    CLUSTER, 16
        .endif
        .set    FIRST, 0x30             # the vectors that are counted: FIRST … LAST
        .set    LAST, 0x9f
        .set    PING, 0xa0              # answered with PONG to processor 0
        .set    PONG, 0xa1

main:   call    start_processors
        mov     $'S', %al
        call    put

        # Fixed, to one processor, over all vectors.
        mov     $'F', %al
        mov     $0x0000, %ebp
        call    to_each
        # Lowest priority with one candidate; logical destination (x2APIC: cluster 0).
        mov     $'L', %al
        mov     $0x0100, %ebp
        call    to_each
        mov     $'C', %al
        mov     $0x0800, %ebp
        call    to_each
        # Logical destination (all of cluster 0); physical broadcast; lowest priority among all: it reaches one.
        mov     $'M', %al
        mov     $0x0800, %ebp
        mov     $(1 << CLUSTER) - 1, %edx
        mov     $CLUSTER, %edi
        call    to_many
        .if     BROADCAST
        mov     $'B', %al
        mov     $0x0000, %ebp
        mov     $-1, %edx
        mov     $CPUS, %edi
        call    to_many
        .endif
        mov     $'Y', %al
        mov     $0x0900, %ebp
        mov     $(1 << CLUSTER) - 1, %edx
        mov     $1, %edi
        call    to_many
        # Shorthands: all others, all, self.
        mov     $'O', %al
        mov     $0xc0000, %ebp
        mov     $CPUS - 1, %edi
        call    to_many
        mov     $'A', %al
        mov     $0x80000, %ebp
        mov     $CPUS, %edi
        call    to_many
        mov     $'X', %al
        mov     $0x40000, %ebp
        mov     $1, %edi
        call    to_many

        # NMI to one processor.
        movl    nmi_rounds, %eax
        mov     %eax, rounds
2:      mov     $1, %ebx
1:      mov     nmis(, %ebx, 4), %esi
        inc     %esi
        mov     $0x400, %eax
        mov     %ebx, %edx
        call    send
        lea     nmis(, %ebx, 4), %edi
        call    await
        inc     %ebx
        cmp     $CPUS, %ebx
        jb      1b
        decl    rounds
        jnz     2b
        mov     $'N', %al
        call    put

        # There and back: processor 0 gets its answer from the other one's handler.
        movl    $ROUNDS, rounds
2:      mov     $1, %ebx
1:      mov     pongs, %esi
        inc     %esi
        mov     $PING, %eax
        mov     %ebx, %edx
        call    send
        mov     $pongs, %edi
        call    await
        inc     %ebx
        cmp     $CPUS, %ebx
        jb      1b
        decl    rounds
        jnz     2b
        mov     $'P', %al
        call    put

        # Start them again, and see that they still hear.
        movl    $RESTARTS, rounds
2:      mov     $1, %ebx
1:      call    start_processor
        mov     pongs, %esi
        inc     %esi
        mov     $PING, %eax
        mov     %ebx, %edx
        call    send
        mov     $pongs, %edi
        call    await
        inc     %ebx
        cmp     $CPUS, %ebx
        jb      1b
        decl    rounds
        jnz     2b
        mov     $'R', %al
        call    put

        # Nothing came that was not sent.
        mov     sent, %eax
        cmp     received, %eax
        jne     fail
        mov     $done_text, %esi
        jmp     end

fail:   mov     $fail_text, %esi
        jmp     end

# ROUNDS times to each other processor, mode EBP (bit 11: its bit is the destination), letter AL. Round by round the
# next vector.
to_each:
        push    %eax
        movl    $ROUNDS, rounds
2:      mov     $1, %ebx
1:      call    next_vector
        mov     %ebx, %edx
        test    $0x800, %ebp
        jz      3f
        mov     $1, %edx
        mov     %ebx, %ecx
        and     $15, %ecx
        shl     %cl, %edx
        mov     %ebx, %ecx
        shr     $4, %ecx
        shl     $16, %ecx
        or      %ecx, %edx
3:      mov     %ebx, %ecx
        shl     $10, %ecx
        lea     counts(%ecx, %eax, 4), %edi
        mov     (%edi), %esi
        inc     %esi
        incl    sent
        or      %ebp, %eax
        call    send
        call    await
        inc     %ebx
        cmp     $CPUS, %ebx
        jb      1b
        decl    rounds
        jnz     2b
        pop     %eax
        jmp     put

# ROUNDS times with mode or shorthand EBP to EDX, which reaches EDI processors; letter AL.
to_many:
        push    %eax
        mov     %edx, destination
        movl    $ROUNDS, rounds
2:      call    next_vector
        or      %ebp, %eax
        mov     sent, %esi
        add     %edi, %esi
        mov     %esi, sent
        mov     destination, %edx
        call    send
        push    %edi
        mov     $received, %edi
        call    await
        pop     %edi
        decl    rounds
        jnz     2b
        pop     %eax
        jmp     put

next_vector:
        mov     vector, %eax
        inc     %eax
        cmp     $LAST, %eax
        jbe     1f
        mov     $FIRST, %eax
1:      mov     %eax, vector
        ret

# The vector is on the stack. Exceptions end the test.
handler:
        pusha
        mov     32(%esp), %ebx
        read_apic_id
        cmp     $2, %ebx
        je      5f
        cmp     $32, %ebx
        jb      fail
        cmp     $PING, %ebx
        je      3f
        cmp     $PONG, %ebx
        je      4f
        mov     %esi, %eax
        shl     $10, %eax
        lock incl counts(%eax, %ebx, 4)
        lock incl received
        jmp     2f
3:      mov     $PONG, %eax
        xor     %edx, %edx
        call    send
        jmp     2f
4:      lock incl pongs
2:      jmp     acknowledge
5:      lock incl nmis(, %esi, 4)
        cmpl    $1, nmi_rounds
        je      leave
        popa
        add     $4, %esp
        iret

        smp_data
        .data
done_text:
        .asciz  " IPI DONE\n"
fail_text:
        .asciz  " IPI FAIL\n"
        .balign 4
vector: .long   FIRST
nmi_rounds: .long NMIS

        .bss
        .balign 64
rounds: .skip   4
        .balign 64
sent:   .skip   4
        .balign 64
received: .skip 4
        .balign 64
pongs:  .skip   4
        .balign 64
nmis:   .skip   4 * 32
counts: .skip   1024 * 32
destination: .skip 4
