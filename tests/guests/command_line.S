# Sends its command line to COM1, byte by byte as it lies in memory, then resets. Entered by PVH.

        .set CMDLINE_PADDR, 24          # of hvm_start_info

        .section .note.pvh, "a", @note
        .long 4, 4, 18
        .asciz "Xen"
        .long start

        .text
        .code32
        .globl start
start:
        mov CMDLINE_PADDR(%ebx), %esi
        mov $0x3F8, %edx
1:      lodsb
        test %al, %al
        jz 2f
        outb %al, %dx
        jmp 1b
2:      mov $0xFE, %al
        outb %al, $0x64
3:      hlt
        jmp 3b
