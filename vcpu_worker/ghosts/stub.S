# The code that ghosts run: 32 bits, flat, no paging. stub.py holds the same bytes; a test assembles this file and
# compares them.
#
# Loaded at 0xfef00000, read-only for the guest (the descriptors have their accessed bits set, so that the processor
# has nothing to write): GDT, IDT, an entry per vector, and the code that they share. Registers: EBX holds the ghost's
# port, EBP the top of its stack. The stack is in a page that the guest can write: nothing is returned to from it but
# by the NMI's handler, and a ghost that was led astray is put back.
        .set    BASE, 0xfef00000
        .set    IDT, 0x800
        .set    ENTRIES, 0x1000
        .set    SHARED, 0x1800
        .set    NMI, 0x1840
        .set    END, 0x2000
        .set    EOI, 0x80b              # MSR: end of interrupt (x2APIC)
        .set    FLAG_IF, 0x200
        .set    PV_EOI, -128            # from the top of the stack: its lowest word

        .text
        .code32
gdt:    .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff

        # 256 interrupt gates: they clear IF.
        .org    IDT
        .set    vector, 0
        .rept   256
        .set    handler, BASE + ENTRIES + 8 * vector
        .if     vector == 2
        .set    handler, BASE + NMI
        .endif
        .short  handler & 0xffff, 8, 0x8e00, handler >> 16
        .set    vector, vector + 1
        .endr

        .org    ENTRIES
        .set    vector, 0
        .rept   256
        movb    $vector, %al
        {disp32} jmp shared
        .balign 8, 0
        .set    vector, vector + 1
        .endr

        .org    SHARED
shared: btrl    $0, PV_EOI(%ebp)        # KVM has set it if the end of the interrupt needs no exit; nor is there one before
        movl    %ebx, %edx
        outb    %al, %dx                # an ioeventfd or, the first time, an exit to the worker
        jc      idle
        xorl    %eax, %eax
        xorl    %edx, %edx
        movl    $EOI, %ecx
        wrmsr
idle:   movl    %ebp, %esp
        sti
        hlt
        jmp     idle

        # The worker lets NMIs in again after it has passed this one on; an IRET would do it too early. What was
        # interrupted is the idle loop (IF set), or a handler, which goes on where it was.
        .org    NMI
nmi:    pushl   %eax
        pushl   %edx
        movb    $2, %al
        movl    %ebx, %edx
        outb    %al, %dx
        testl   $FLAG_IF, 16(%esp)
        popl    %edx
        popl    %eax
        jnz     idle
        ret     $8

        .org    END
