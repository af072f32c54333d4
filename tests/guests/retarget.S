# Counts the interrupts of a device (the UART's transmitter: one per byte that is written, at least ROUNDS of them, each
# waited for) while processor 1 rewrites the IOAPIC's entry of it all the time, so that each goes to any of CPUS processors.
# One that is lost, or comes twice, ends the test. COM1 gets a dot per interrupt, then how often the entry was written
# (hexadecimal) and "RETARGET DONE", or "RETARGET FAIL"; then the machine is reset by the keyboard controller.
# Symbols, which may be set from outside: CPUS (2 … 8), ROUNDS, MOVES (the entry is to be written so often).
        .include "smp.inc"
        default ROUNDS, 100
        default MOVES, 20

        .set    VECTOR, 0x51
        .set    GO, 0x61                # processor 1 begins to rewrite
        .set    IOAPIC, 0xfec00000
        .set    PIN_LOW, 0x10 + 2 * 4
        .set    UART, 0x3f8
        .set    IER_THRI, 2

main:   call    start_processors
        # The entry: fixed, edge, to processor 0; one interrupt comes when the UART is told to give them.
        movl    $PIN_LOW + 1, IOAPIC
        movl    $0, IOAPIC + 0x10
        movl    $PIN_LOW, IOAPIC
        movl    $VECTOR, IOAPIC + 0x10
        mov     $UART + 1, %edx
        mov     $IER_THRI, %al
        outb    %al, %dx
        mov     $1, %esi
        mov     $count, %edi
        call    await
        mov     $GO, %eax
        mov     $1, %edx
        call    send
1:      inc     %esi
        mov     $'.', %al
        call    put
        call    await
        cmp     $ROUNDS, %esi
        jb      1b
        cmpl    $MOVES, moves
        jb      1b
        mov     %esi, sent

        # The last one, once more: nothing may come late.
        movl    $1, stop
        mov     $1, %esi
        mov     $stopped, %edi
        call    await
        mov     $UART + 1, %edx
        xor     %eax, %eax
        outb    %al, %dx
        mov     $100000, %ecx
1:      pause
        loop    1b
        mov     sent, %eax
        cmp     %eax, count
        jne     fail
        mov     moves, %ebx
        mov     $8, %ecx
1:      rol     $4, %ebx
        mov     %ebx, %eax
        and     $15, %eax
        mov     digits(%eax), %al
        call    put
        loop    1b
        # Every processor was reached.
        xor     %ebx, %ebx
1:      cmpl    $0, reached(, %ebx, 4)
        je      fail
        inc     %ebx
        cmp     $CPUS, %ebx
        jb      1b
        mov     $done_text, %esi
        jmp     end

fail:   mov     $UART + 1, %edx
        xor     %eax, %eax
        outb    %al, %dx
        mov     $fail_text, %esi
        jmp     end

handler:
        pusha
        mov     32(%esp), %ebx
        cmp     $VECTOR, %ebx
        je      1f
        cmp     $GO, %ebx
        jne     fail
        mov     $EOI, %ecx
        xor     %eax, %eax
        xor     %edx, %edx
        wrmsr
        sti
        jmp     rewrite
1:      mov     $APIC_ID, %ecx
        rdmsr
        lock incl reached(, %eax, 4)
        lock incl count
        jmp     acknowledge

# On processor 1, in the handler of GO: it does not return before the end. Only the entry's high half changes its
# destination; the low one is masked and unmasked every fourth time, as drivers do.
rewrite:
        mov     $1, %ebx
1:      inc     %ebx
        cmp     $CPUS, %ebx
        jb      2f
        xor     %ebx, %ebx
2:      mov     moves, %eax
        and     $3, %eax
        jnz     3f
        movl    $PIN_LOW, IOAPIC
        movl    $VECTOR | 1 << 16, IOAPIC + 0x10
3:      mov     %ebx, %edx
        shl     $24, %edx
        movl    $PIN_LOW + 1, IOAPIC
        mov     %edx, IOAPIC + 0x10
        test    %eax, %eax
        jnz     4f
        movl    $PIN_LOW, IOAPIC
        movl    $VECTOR, IOAPIC + 0x10
4:      incl    moves
        cmpl    $0, stop
        je      1b
        movl    $1, stopped
5:      hlt
        jmp     5b

        smp_data
        .data
digits: .ascii  "0123456789abcdef"
done_text:
        .asciz  " RETARGET DONE\n"
fail_text:
        .asciz  " RETARGET FAIL\n"
        .bss
        .balign 64
count:  .skip   4
        .balign 64
sent:   .skip   4
moves:  .skip   4
stop:   .skip   4
stopped: .skip  4
reached: .skip  4 * 32
