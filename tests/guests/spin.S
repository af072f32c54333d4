# Says that it runs ("spinning" on COM1), then counts in a register for ever: no exits. Entered by PVH.

        .section .note.pvh, "a", @note
        .long 4, 4, 18
        .asciz "Xen"
        .long start

        .text
        .code32
        .globl start
start:
        mov $0x3F8, %edx
        mov $text, %esi
1:      movb (%esi), %al
        test %al, %al
        jz 2f
        outb %al, %dx
        inc %esi
        jmp 1b
2:      xor %eax, %eax
3:      inc %eax
        jmp 3b

        .section .rodata
text:   .asciz "spinning\n"
