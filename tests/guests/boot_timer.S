# Tells the boot timer that it is up (the byte 123 at 0xC0000000), says so on COM1, then waits for ever without exits.
# Entered by PVH.

        .section .note.pvh, "a", @note
        .long 4, 4, 18
        .asciz "Xen"
        .long start

        .text
        .code32
        .globl start
start:
        mov $0xC0000000, %ebx
        movb $123, (%ebx)
        mov $0x3F8, %edx
        mov $text, %esi
1:      movb (%esi), %al
        test %al, %al
        jz 2f
        outb %al, %dx
        inc %esi
        jmp 1b
2:      inc %eax
        jmp 2b

        .section .rodata
text:   .asciz "timed\n"
