# Attacks the ghosts of its processors in every way that it has: writes over the whole range of the stub, OUT to and IN
# from the ghosts' ports, every vector to every processor, NMIs and SMIs, and, if ATTACK is 1, their stacks while an NMI
# is handled there, so that a ghost "returns" to code of ours. COM1 gets a letter per attack, P if the processors still
# hear each other in the end, then "HOSTILE DONE"; then all halt.
# Symbols, which may be set from outside: CPUS (2 … 8), ATTACK: 0 floods, ROUNDS times; 1 leads ghosts astray, ROUNDS
# times; 2 as 0 with SMIs; 3 as 0 without NMIs, whose handlers' stacks the writes may damage: that ends the machine.
        .include "smp.inc"
        default ATTACK, 0
        default ROUNDS, 1

        .set    PING, 0xa0              # answered with PONG to processor 0
        .set    PONG, 0xa1
        .set    STUB, 0xfef00000
        .set    GHOST_PORT, 0xe00
        .set    SMI_CODE, 0x38000

main:   call    start_processors
        mov     $'S', %al
        call    put
        movl    $ROUNDS, rounds
        cmpl    $1, attack
        je      astray

flood:  call    overwrite
        call    ports
        call    vectors
        cmpl    $2, attack
        jne     1f
        call    smis
1:      decl    rounds
        jnz     flood
        mov     $'F', %al
        call    put
        jmp     ping

# ------------------------------------------------------------ floods

# Code, stacks, and what lies behind them.
overwrite:
        mov     $STUB, %edi
        mov     $0xcccccccc, %eax
1:      mov     %eax, (%edi)
        add     $4, %edi
        cmp     $STUB + 0x4000, %edi
        jb      1b
        ret

# Ports of all processors and some more, every value, in every size.
ports:  mov     $GHOST_PORT, %edx
2:      xor     %eax, %eax
1:      outb    %al, %dx
        inc     %eax
        cmp     $256, %eax
        jb      1b
        outw    %ax, %dx
        outl    %eax, %dx
        inb     %dx, %al
        inl     %dx, %eax
        inc     %edx
        cmp     $GHOST_PORT + CPUS + 2, %edx
        jb      2b
        ret

# Every vector, also those that no processor takes, fixed, lowest priority and to all others, without waiting.
vectors:
        xor     %ebp, %ebp
2:      mov     $1, %ebx
1:      mov     %ebp, %eax
        mov     %ebx, %edx
        call    send
        mov     %ebp, %eax
        or      $0x100, %eax
        mov     %ebx, %edx
        call    send
        inc     %ebx
        cmp     $CPUS, %ebx
        jb      1b
        mov     %ebp, %eax
        or      $0xc0000, %eax
        call    send
        inc     %ebp
        cmp     $256, %ebp
        jb      2b
        mov     $0xc0400, %eax          # an NMI
        cmpl    $3, attack
        jne     send
        ret

# The code of the system management mode is RSM; its state is saved in memory that all share.
smis:   movl    $0xaa0f, SMI_CODE
        mov     $0xc0200, %eax
        jmp     send

# ------------------------------------------------------------ stacks

# The ghost's handler of an NMI is interrupted by an exit. What it finds on its stack afterwards is ours: flags without
# IF, as if a handler had been interrupted, and the address where to go on. Again until a ghost has come there.
astray: movl    $0, caught
3:      mov     $1, %ebx
2:      mov     $0x400, %eax
        mov     %ebx, %edx
        call    send
        mov     $500, %edx
1:      mov     %ebx, %edi
        shl     $7, %edi                # its stack: 128 bytes
        add     $STUB + 0x2000, %edi
        mov     $captive, %eax
        mov     $32, %ecx
        rep stosl
        dec     %edx
        jnz     1b
        inc     %ebx
        cmp     $CPUS, %ebx
        jb      2b
        cmpl    $0, caught
        je      3b
        decl    rounds
        jnz     astray
        mov     $'A', %al
        call    put

# ------------------------------------------------------------ do they still hear?

ping:   mov     $1, %ebx
1:      mov     pongs, %esi
        inc     %esi
        mov     $PING, %eax
        mov     %ebx, %edx
        call    send
        mov     $pongs, %edi
        mov     $PATIENCE, %ecx
2:      cmp     %esi, (%edi)
        jae     3f
        pause
        loop    2b
fail:   mov     $fail_text, %esi
        jmp     end
3:      inc     %ebx
        cmp     $CPUS, %ebx
        jb      1b
        mov     $done_text, %esi
4:      lodsb
        test    %al, %al
        jz      5f
        call    put
        jmp     4b
5:      hlt
        jmp     5b

# Everything is acknowledged, whatever it is.
handler:
        pusha
        mov     32(%esp), %ebx
        cmp     $2, %ebx
        je      leave
        cmp     $PING, %ebx
        jne     1f
        mov     $PONG, %eax
        xor     %edx, %edx
        call    send
        jmp     acknowledge
1:      cmp     $PONG, %ebx
        jne     acknowledge
        lock incl pongs
        jmp     acknowledge

# Where a ghost is led to: it stays there. Bit 9 of the address is 0, which says "IF" in the flags.
        .balign 0x400
captive:
        movl    $1, caught
1:      jmp     1b

        smp_data
        .data
done_text:
        .asciz  "P HOSTILE DONE\n"
fail_text:
        .asciz  " HOSTILE FAIL\n"
        .balign 4
attack: .long   ATTACK
        .bss
        .balign 64
rounds: .skip   4
caught: .skip   4
pongs:  .skip   4
