# Exercises every exit path against the exerciser device (vmm/devices/legacy/exerciser.py): each write carries the next
# count, each read of the last count is compared. The number of rounds is the first word of the command line.
# Entered by PVH: 32-bit protected mode, flat segments, paging off.

        .equ PORT, 0x620
        .equ MMIO, 0xEEBFE000
        .equ COMMAND_LINE, 0x20000

        .section .note.pvh, "a", @note
        .long 4, 4, 18
        .asciz "Xen"
        .long start

        .text
        .code32
        .globl start
start:
        cli
        mov $stack_top, %esp
        xor %ebp, %ebp                  # ebp: errors
        xor %ebx, %ebx                  # ebx: the count
        mov $COMMAND_LINE, %esi
        xor %edi, %edi                  # edi: rounds
1:      movzbl (%esi), %eax
        sub $'0', %eax
        cmp $9, %eax
        ja 2f
        imul $10, %edi
        add %eax, %edi
        inc %esi
        jmp 1b
2:      mov $table, %ecx                # a table of the bytes 0 … 255
        xor %eax, %eax
3:      mov %al, (%ecx,%eax)
        inc %eax
        cmp $256, %eax
        jb 3b

round:
        test %edi, %edi
        jz finished
        dec %edi

        # port writes of 4, 2 and 1 bytes, posted and synchronous
        mov $PORT, %edx
        inc %ebx; mov %ebx, %eax; outl %eax, %dx
        inc %ebx; mov %ebx, %eax; outw %ax, %dx
        inc %ebx; mov %ebx, %eax; outb %al, %dx
        mov $PORT + 4, %edx
        inc %ebx; mov %ebx, %eax; outl %eax, %dx
        inc %ebx; mov %ebx, %eax; outw %ax, %dx
        inc %ebx; mov %ebx, %eax; outb %al, %dx

        # a posted write, then a synchronous read: it must see the write
        mov $PORT, %edx
        inc %ebx; mov %ebx, %eax; outl %eax, %dx
        mov $PORT + 8, %edx
        inl %dx, %eax
        cmp %ebx, %eax
        je 1f
        inc %ebp
1:      xor %eax, %eax
        inw %dx, %ax
        cmp %bx, %ax
        je 1f
        inc %ebp
1:      inb %dx, %al
        cmp %bl, %al
        je 1f
        inc %ebp

        # reads that the worker answers
1:      mov $PORT + 0xC, %edx
        inl %dx, %eax
        cmp $0x5A5A5A5A, %eax
        je 1f
        inc %ebp
1:      inw %dx, %ax
        cmp $0x5A5A, %ax
        je 1f
        inc %ebp
1:      inb %dx, %al
        cmp $0x5A, %al
        je 1f
        inc %ebp

        # a port where no device sits
1:      mov $0x700, %edx
        inl %dx, %eax
        test %eax, %eax
        jz 1f
        inc %ebp

        # MMIO writes of 4, 2 and 1 bytes, posted and synchronous; a read that must see them
1:      inc %ebx; mov %ebx, %eax; mov %eax, MMIO
        inc %ebx; mov %ebx, %eax; mov %ax, MMIO
        inc %ebx; mov %ebx, %eax; mov %al, MMIO
        inc %ebx; mov %ebx, %eax; mov %eax, MMIO + 0x1000
        inc %ebx; mov %ebx, %eax; mov %ax, MMIO + 0x1000
        inc %ebx; mov %ebx, %eax; mov %al, MMIO + 0x1000
        inc %ebx; mov %ebx, %eax; mov %eax, MMIO
        mov MMIO + 8, %eax
        cmp %ebx, %eax
        je 1f
        inc %ebp

        # string I/O: 256 bytes out and in
1:      cld
        mov $PORT + 0xD, %edx
        mov $table, %esi
        mov $256, %ecx
        rep outsb
        push %edi
        mov $input, %edi
        mov $256, %ecx
        rep insb
        mov $table, %esi
        mov $input, %edi
        mov $256, %ecx
        repe cmpsb
        pop %edi
        je round
        inc %ebp
        jmp round

finished:
        mov $PORT + 0xF, %edx
        mov %ebp, %eax
        cmp $255, %eax
        jbe 1f
        mov $255, %eax
1:      outb %al, %dx
        hlt
        jmp 1b

        .bss
        .align 16
table:  .skip 256
input:  .skip 256
        .skip 4096
stack_top:
