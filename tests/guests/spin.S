# Says that it runs (one byte on COM1), then counts in a register for ever: no exits. Entered by PVH.

        .section .note.pvh, "a", @note
        .long 4, 4, 18
        .asciz "Xen"
        .long start

        .text
        .code32
        .globl start
start:
        mov $0x3F8, %edx
        mov $'R', %al
        outb %al, %dx
        mov $'\n', %al
        outb %al, %dx
        xor %eax, %eax
1:      inc %eax
        jmp 1b
