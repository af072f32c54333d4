# The startup benchmark's guest: its first instructions send one byte to COM1, then it sleeps for ever. Entered by PVH,
# by us as by QEMU.

        .section .note.pvh, "a", @note
        .long 4, 4, 18
        .asciz "Xen"
        .long start

        .text
        .code32
        .globl start
start:
        mov $0x3F8, %edx
        mov $'!', %al
        outb %al, %dx
        cli
1:      hlt
        jmp 1b
