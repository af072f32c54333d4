# Starts processor 1 twice, and waits between INIT and SIPI for a byte on COM1. COM1 gets "I" after each INIT, "S" when
# the processor has come up, then "INIT DONE"; then the machine is reset by the keyboard controller. CPUS: 2 or more.
        .include "smp.inc"

        .set    UART, 0x3f8
        .set    ROUNDS, 2

main:   movl    $ROUNDS, rounds
1:      mov     $0x4500, %eax
        mov     $1, %edx
        call    send
        mov     $'I', %al
        call    put
        mov     $'\n', %al
        call    put
        mov     $UART + 5, %edx
2:      inb     %dx, %al
        pause
        test    $1, %al
        jz      2b
        mov     $UART, %edx
        inb     %dx, %al
        lea     online + 4, %edi
        mov     (%edi), %esi
        inc     %esi
        mov     $0x4600 | TRAMPOLINE >> 12, %eax
        mov     $1, %edx
        call    send
        call    await
        mov     $'S', %al
        call    put
        mov     $'\n', %al
        call    put
        decl    rounds
        jnz     1b
        mov     $done_text, %esi
        jmp     end
handler:
fail:   mov     $fail_text, %esi
        jmp     end

        smp_data
        .data
done_text:
        .asciz  "INIT DONE\n"
fail_text:
        .asciz  "INIT FAIL\n"
        .bss
rounds: .skip   4
