# The exit benchmark's guest: sends one byte to COM1, makes ROUNDS exits of one KIND at PORT, sends another byte, sleeps.
# ROUNDS, KIND and PORT are symbols that the build defines (else 1000 reads of LSR). Entered by PVH, by us as by QEMU.

        .equ READ, 0                    # inb
        .equ WRITE, 1                   # outl of a count that rises by one
        .equ PRINT, 2                   # outb of a dot
        .ifndef KIND
        .equ ROUNDS, 1000
        .equ KIND, READ
        .equ PORT, 0x3FD
        .endif

        .section .note.pvh, "a", @note
        .long 4, 4, 18
        .asciz "Xen"
        .long start

        .text
        .code32
        .globl start
start:
        cli
        mov $ROUNDS, %ecx
        xor %ebx, %ebx
        mov $0x3F8, %edx
        mov $'<', %al
        outb %al, %dx
        mov $PORT, %edx
        .if KIND == READ
1:      inb %dx, %al
        dec %ecx
        jnz 1b
        .elseif KIND == PRINT
        mov $'.', %al
1:      outb %al, %dx
        dec %ecx
        jnz 1b
        .else
1:      inc %ebx
        mov %ebx, %eax
        outl %eax, %dx
        dec %ecx
        jnz 1b
        .endif
        mov $0x3F8, %edx
        mov $'>', %al
        outb %al, %dx
1:      hlt
        jmp 1b
