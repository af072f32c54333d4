# Says "HERE", waits for a byte on COM1, and resets the machine: at "t" by a triple fault, else by the keyboard
# controller. A word in memory must not survive that: then it says "OLD". All processors are brought up before.
# CPUS: 2 or more.
        .include "smp.inc"

        .set    UART, 0x3f8
        .set    COOKIE, 0x300000

main:   cmpl    $0x12345678, COOKIE
        je      old
        movl    $0x12345678, COOKIE
        call    start_processors
        mov     $here_text, %esi
        call    say
        mov     $UART + 5, %edx
2:      inb     %dx, %al
        pause
        test    $1, %al
        jz      2b
        mov     $UART, %edx
        inb     %dx, %al
        cmp     $'t', %al
        jne     3f
        cli
        lidt    no_idt
        ud2
3:      mov     $0xfe, %al
        outb    %al, $0x64
1:      hlt
        jmp     1b

old:    mov     $old_text, %esi
        call    say
        jmp     1b

say:    lodsb
        test    %al, %al
        jz      1f
        call    put
        jmp     say
1:      ret

handler:
fail:   mov     $fail_text, %esi
        jmp     end

        smp_data
        .data
here_text:
        .asciz  "HERE\n"
old_text:
        .asciz  "OLD\n"
fail_text:
        .asciz  "FAIL\n"
        .balign 8
no_idt: .word   0
        .long   0
