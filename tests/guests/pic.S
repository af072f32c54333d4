# The 8259s and the 8254 as a guest without ACPI uses them: ticks of counter 0 as external interrupts of processor 0, by
# way of LINT0. COM1 gets a letter per part that was passed, and "PIC DONE" or "PIC FAIL"; then the machine is reset.
# h: ROUNDS ticks wake it from HLT. i: while interrupts are off one waits in the IRR, and comes when they are on. m: none
# while it is masked. e: none, and one in service, until the end of interrupt. s: the UART's interrupt comes the same way,
# and goes first the other way round when priorities are rotated.
# Symbols, which may be set from outside: CPUS (1 … 8), ROUNDS.
        .include "smp.inc"
        default ROUNDS, 50

        .set    MASTER, 0x20
        .set    SLAVE, 0xa0
        .set    BASE, 0x20
        .set    TIMER, BASE
        .set    SERIAL, BASE + 4
        .set    UART, 0x3f8
        .set    READ_IRR, 0x0a
        .set    READ_ISR, 0x0b
        .set    UNSPECIFIC_EOI, 0x20

        .macro  write port, value
        mov     $\value, %al
        outb    %al, $\port
        .endm

main:   .if     CPUS > 1
        call    start_processors
        .endif
        cli
        write   MASTER, 0x11
        write   MASTER + 1, BASE
        write   MASTER + 1, 4
        write   MASTER + 1, 1
        write   SLAVE, 0x11
        write   SLAVE + 1, BASE + 8
        write   SLAVE + 1, 2
        write   SLAVE + 1, 1
        write   SLAVE + 1, 0xff
        write   MASTER + 1, 0xfe
        inb     $MASTER + 1, %al
        cmp     $0xfe, %al
        jne     fail
        write   0x43, 0x34              # counter 0, both bytes, mode 2: every millisecond
        write   0x40, 0xa9
        write   0x40, 0x04

        sti
1:      hlt
        cmpl    $ROUNDS, ticks
        jb      1b
        mov     $'h', %al
        call    put

        cli
        mov     ticks, %ebx
        mov     $READ_IRR, %al
        call    await_tick
        cmp     %ebx, ticks
        jne     fail
        sti
        call    await_more
        mov     $'i', %al
        call    put

        write   MASTER + 1, 0xff
        inb     $MASTER + 1, %al        # nothing is under way any more
        nop
        mov     ticks, %ebx
        call    pass_time
        cmp     %ebx, ticks
        jne     fail
        write   MASTER + 1, 0xfe
        call    await_more
        mov     $'m', %al
        call    put

        movl    $1, keep
        mov     ticks, %ebx
        call    await_more
        call    pass_time
        inc     %ebx
        cmp     %ebx, ticks
        jne     fail
        write   MASTER, READ_ISR
        inb     $MASTER, %al
        cmp     $1, %al
        jne     fail
        movl    $0, keep
        write   MASTER, UNSPECIFIC_EOI
        call    await_more
        mov     $'e', %al
        call    put

        # Both wait while interrupts are off; input 4 has the highest priority after input 3 was made the lowest.
        cli
        write   MASTER, 0xc3
        write   MASTER + 1, 0xee
        mov     $UART + 1, %edx
        mov     $2, %al
        outb    %al, %dx
        mov     $READ_IRR, %al
        call    await_tick
        movl    $0, first
        sti
        nop
1:      pause
        cmpl    $0, first
        je      1b
        cli
        cmpl    $SERIAL, first
        jne     fail
        mov     $UART + 1, %edx
        xor     %eax, %eax
        outb    %al, %dx
        sti
        mov     ticks, %ebx
        call    await_more
        cli
        mov     $done_text, %esi
        jmp     end

fail:   cli
        mov     $fail_text, %esi
        jmp     end

# Wait until the timer's bit is set in the register that the command AL selects.
await_tick:
        outb    %al, $MASTER
        mov     $PATIENCE, %ecx
1:      inb     $MASTER, %al
        test    $1, %al
        jnz     2f
        loop    1b
        jmp     fail
2:      ret

# Wait until there are more ticks than EBX.
await_more:
        mov     $PATIENCE, %ecx
1:      cmp     %ebx, ticks
        ja      2f
        pause
        loop    1b
        jmp     fail
2:      ret

# Some ticks long: counter 2 counts 5 ms down.
pass_time:
        inb     $0x61, %al
        and     $0xfc, %al
        or      $1, %al
        outb    %al, $0x61
        write   0x43, 0xb0
        write   0x42, 0x4e
        write   0x42, 0x17
1:      inb     $0x61, %al
        test    $0x20, %al
        jz      1b
        ret

handler:
        pusha
        mov     32(%esp), %ebx
        cmpl    $0, first
        jne     1f
        mov     %ebx, first
1:      cmp     $TIMER, %ebx
        je      2f
        cmp     $SERIAL, %ebx
        jne     fail
        jmp     3f
2:      incl    ticks
        cmpl    $0, keep
        jne     leave
3:      write   MASTER, UNSPECIFIC_EOI
        jmp     leave

        smp_data
        .data
first:  .long   1
ticks:  .long   0
keep:   .long   0
done_text:
        .asciz  "s PIC DONE\r\n"
fail_text:
        .asciz  " PIC FAIL\r\n"
