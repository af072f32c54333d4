# Shuts the CPU down: an exception with an empty interrupt descriptor table (triple fault). Entered by PVH.

        .section .note.pvh, "a", @note
        .long 4, 4, 18
        .asciz "Xen"
        .long start

        .text
        .code32
        .globl start
start:
        cli
        lidt empty
        ud2
1:      hlt
        jmp 1b

        .data
empty:  .word 0
        .long 0
