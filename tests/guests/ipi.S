# Sends every kind of interprocessor interrupt between CPUS processors, ROUNDS times each, and counts what arrives.
# Entered by PVH; 32 bits, flat, no paging, x2APIC. COM1 gets a letter per kind that was complete, then "IPI DONE", or
# "IPI FAIL" after the letter of the kind that was not; then the machine is reset by the keyboard controller.
# Symbols, which may be set from outside: CPUS (2 … 8), ROUNDS, NMIS (how many of them; 1 where nothing can return from one, see below) and
# RESTARTS (how often each processor is started again).
# Handlers return without IRET: KVM's instruction emulator, which runs ring 0 on some hosts, lacks it in protected mode.
# Only IRET lets the next NMI in.

        .macro  default symbol, value
        .ifndef \symbol
        .set    \symbol, \value
        .endif
        .endm
        default CPUS, 2
        default ROUNDS, 100
        default NMIS, 1
        default RESTARTS, 1

        .set    ICR, 0x830
        .set    SELF_IPI, 0x83f
        .set    EOI, 0x80b
        .set    SPURIOUS, 0x80f
        .set    APIC_ID, 0x802
        .set    TRAMPOLINE, 0x70000
        .set    FIRST, 0x30             # the vectors that are counted: FIRST … LAST
        .set    LAST, 0x9f
        .set    PING, 0xa0              # answered with PONG to processor 0
        .set    PONG, 0xa1
        .set    STACKS, 0x200000        # 4 KiB each
        .set    PATIENCE, 400000000

        .section .note.pvh, "a", @note
        .long 4, 4, 18
        .asciz "Xen"
        .long start

        .text
        .code32
        .globl start
start:  lgdt    gdt_pointer
        ljmp    $8, $1f
1:      mov     $16, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $STACKS + 0x1000, %esp
        call    make_idt
        call    join
        sti
        mov     $trampoline, %esi
        mov     $TRAMPOLINE, %edi
        mov     $trampoline_end - trampoline, %ecx
        rep movsb

        # Every processor starts, one after the other.
        mov     $1, %ebx
1:      call    start_processor
        inc     %ebx
        cmp     $CPUS, %ebx
        jb      1b
        mov     $'S', %al
        call    put

        # Fixed, to one processor, over all vectors.
        mov     $'F', %al
        mov     $0x0000, %ebp
        call    to_each
        # Lowest priority with one candidate; logical destination (cluster 0).
        mov     $'L', %al
        mov     $0x0100, %ebp
        call    to_each
        mov     $'C', %al
        mov     $0x0800, %ebp
        call    to_each
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
end:    lodsb
        test    %al, %al
        jz      1f
        call    put
        jmp     end
1:      mov     $0xfe, %al
        outb    %al, $0x64
1:      hlt
        jmp     1b

put:    push    %edx
        mov     $0x3f8, %edx
        outb    %al, %dx
        pop     %edx
        ret

# Interrupt command EAX to destination EDX.
send:   mov     $ICR, %ecx
        wrmsr
        ret

# Wait until the word at EDI is ESI; more is an error, and so is too long a wait.
await:  mov     $PATIENCE, %ecx
1:      mov     (%edi), %eax
        cmp     %esi, %eax
        je      2f
        ja      fail
        pause
        loop    1b
        jmp     fail
2:      ret

# INIT, SIPI to EBX; wait until it has come up once more.
start_processor:
        lea     online(, %ebx, 4), %edi
        mov     (%edi), %esi
        inc     %esi
        mov     $0x4500, %eax
        mov     %ebx, %edx
        call    send
        mov     $0x4600 | TRAMPOLINE >> 12, %eax
        mov     %ebx, %edx
        call    send
        jmp     await

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
        shl     %cl, %edx
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

# ROUNDS times with shorthand EBP, that reaches EDI processors; letter AL.
to_many:
        push    %eax
        movl    $ROUNDS, rounds
2:      call    next_vector
        or      %ebp, %eax
        mov     sent, %esi
        add     %edi, %esi
        mov     %esi, sent
        xor     %edx, %edx
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

# x2APIC on, IDT loaded; ESI is the processor's number afterwards.
join:   mov     $0x1b, %ecx
        rdmsr
        or      $0xc00, %eax
        wrmsr
        mov     $SPURIOUS, %ecx
        mov     $0x1ff, %eax
        xor     %edx, %edx
        wrmsr
        mov     $APIC_ID, %ecx
        rdmsr
        mov     %eax, %esi
        lidt    idt_pointer
        ret

make_idt:
        mov     $idt, %edi
        mov     $entries, %esi
        xor     %ecx, %ecx
1:      mov     %esi, %eax
        mov     %ax, (%edi)
        movw    $8, 2(%edi)
        movw    $0x8e00, 4(%edi)
        shr     $16, %eax
        mov     %ax, 6(%edi)
        add     $16, %esi
        add     $8, %edi
        inc     %ecx
        cmp     $256, %ecx
        jb      1b
        ret

# Processors other than 0.
other:  mov     $16, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $1f, %ebx
        jmp     join_without_stack
1:      mov     %esi, %eax
        shl     $12, %eax
        lea     STACKS + 0x1000(%eax), %esp
        sti
        lock incl online(, %esi, 4)
1:      hlt
        jmp     1b

# As join, but it goes on at EBX: there is no stack yet.
join_without_stack:
        mov     $0x1b, %ecx
        rdmsr
        or      $0xc00, %eax
        wrmsr
        mov     $SPURIOUS, %ecx
        mov     $0x1ff, %eax
        xor     %edx, %edx
        wrmsr
        mov     $APIC_ID, %ecx
        rdmsr
        mov     %eax, %esi
        lidt    idt_pointer
        jmp     *%ebx

        .balign 16
entries:
        .set    number, 0
        .rept   256
        push    $number
        {disp32} jmp handler
        .balign 16
        .set    number, number + 1
        .endr

# The vector is on the stack. Exceptions end the test.
handler:
        pusha
        mov     32(%esp), %ebx
        mov     $APIC_ID, %ecx
        rdmsr
        mov     %eax, %esi
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
2:      mov     $EOI, %ecx
        xor     %eax, %eax
        xor     %edx, %edx
        wrmsr
6:      popa
        add     $4, %esp
        pushl   8(%esp)
        popf
        ret     $8
5:      lock incl nmis(, %esi, 4)
        cmpl    $1, nmi_rounds
        je      6b
        popa
        add     $4, %esp
        iret

# Copied below 1 MiB: real mode to protected mode.
        .balign 16
trampoline:
        .code16
        cli
        xor     %ax, %ax
        mov     $TRAMPOLINE >> 4, %ax
        mov     %ax, %ds
        lgdtl   low_pointer - trampoline
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $8, $other
        .balign 8
low_pointer:
        .word   23
        .long   TRAMPOLINE + low_gdt - trampoline
        .balign 8
low_gdt:
        .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff
trampoline_end:
        .code32

        .data
        .balign 8
gdt:    .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
        .word   23
        .long   gdt
idt_pointer:
        .word   2047
        .long   idt
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
online: .skip   4 * 32
nmis:   .skip   4 * 32
counts: .skip   1024 * 32
idt:    .skip   2048
