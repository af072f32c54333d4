# Resets the machine the way Linux does with reboot=k: command 0xFE of the keyboard controller. Entered by PVH.

        .section .note.pvh, "a", @note
        .long 4, 4, 18
        .asciz "Xen"
        .long start

        .text
        .code32
        .globl start
start:
        mov $0xFE, %al
        outb %al, $0x64
1:      hlt
        jmp 1b
