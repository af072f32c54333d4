# What the worker's own tests run: 64-bit code at CPL 0, identity-mapped, entered at _start. The parameter block at
# 0x20000 holds a mode and a number. MMIO windows lie in the identity map above the guest's memory.

        .equ PARAMETERS, 0x20000
        .equ POSTED, 0x600              # port windows
        .equ CALLED, 0x604
        .equ READ_BACK, 0x608
        .equ LOCAL, 0x60C
        .equ ECHO, 0x610                # string I/O
        .equ FAILED, 0x6F0
        .equ DONE, 0x6F4
        .equ NOBODY, 0x700
        .equ MMIO_POSTED, 0x20000000
        .equ MMIO_CALLED, 0x20001000
        .equ MMIO_READ, 0x20002000
        .equ MMIO_LOCAL, 0x20003000
        .equ MMIO_NOBODY, 0x20008000
        .equ CODE, 0x08                 # selector in the boot GDT

        .text
        .code64
        .globl _start
_start:
        mov $stack_top, %rsp
        mov PARAMETERS, %eax
        mov PARAMETERS + 8, %rdi        # rounds
        xor %rbx, %rbx                  # the count
        jmp *modes(,%rax,8)

# Every kind of exit, each write with the next count, each read compared with the last one.
exits:
        mov $table, %rcx
        xor %eax, %eax
1:      mov %al, (%rcx,%rax)
        inc %eax
        cmp $256, %eax
        jb 1b
exits_round:
        test %rdi, %rdi
        jz done
        dec %rdi

        mov $POSTED, %edx
        inc %ebx; mov %ebx, %eax; outl %eax, %dx
        inc %ebx; mov %ebx, %eax; outw %ax, %dx
        inc %ebx; mov %ebx, %eax; outb %al, %dx
        mov $CALLED, %edx
        inc %ebx; mov %ebx, %eax; outl %eax, %dx
        inc %ebx; mov %ebx, %eax; outw %ax, %dx
        inc %ebx; mov %ebx, %eax; outb %al, %dx
        mov $POSTED, %edx
        inc %ebx; mov %ebx, %eax; outl %eax, %dx

        mov $1, %r8d
        mov $READ_BACK, %edx
        inl %dx, %eax
        cmp %ebx, %eax
        jne failed
        mov $2, %r8d
        xor %eax, %eax
        inw %dx, %ax
        cmp %bx, %ax
        jne failed
        mov $3, %r8d
        inb %dx, %al
        cmp %bl, %al
        jne failed

        mov $4, %r8d
        mov $LOCAL, %edx
        inl %dx, %eax
        cmp $0x5A5B5C5D, %eax
        jne failed
        mov $5, %r8d
        xor %eax, %eax
        inw %dx, %ax
        cmp $0x5C5D, %eax
        jne failed
        mov $6, %r8d
        xor %eax, %eax
        inb %dx, %al
        cmp $0x5D, %eax
        jne failed

        mov $7, %r8d
        mov $NOBODY, %edx
        outl %eax, %dx
        inl %dx, %eax
        test %eax, %eax
        jnz failed
        mov $8, %r8d
        movq $-1, MMIO_NOBODY           # dropped, and not what the next read gives
        mov MMIO_NOBODY, %rax
        test %rax, %rax
        jnz failed

        inc %rbx; mov %rbx, MMIO_POSTED
        inc %rbx; mov %ebx, MMIO_POSTED
        inc %rbx; mov %bx, MMIO_POSTED
        inc %rbx; mov %bl, MMIO_POSTED
        inc %rbx; mov %rbx, MMIO_CALLED
        inc %rbx; mov %ebx, MMIO_CALLED
        inc %rbx; mov %bx, MMIO_CALLED
        inc %rbx; mov %bl, MMIO_CALLED
        inc %rbx; mov %ebx, MMIO_POSTED

        mov $9, %r8d
        mov MMIO_READ, %rax
        cmp %rbx, %rax
        jne failed
        mov $10, %r8d
        mov MMIO_READ, %eax
        cmp %ebx, %eax
        jne failed
        mov $11, %r8d
        mov MMIO_READ, %ax
        cmp %bx, %ax
        jne failed
        mov $12, %r8d
        mov MMIO_READ, %al
        cmp %bl, %al
        jne failed
        mov $13, %r8d
        mov MMIO_LOCAL, %eax
        cmp $0x11223344, %eax
        jne failed
        mov $14, %r8d
        mov MMIO_LOCAL, %rax
        cmp $0x11223344, %rax
        jne failed

        mov %rdi, %r9                   # strings, elements of 1, 2 and 4 bytes
        cld
        mov $15, %r8d
        mov $ECHO, %edx
        mov $table, %rsi
        mov $256, %ecx
        rep outsb
        mov $input, %rdi
        mov $256, %ecx
        rep insb
        call compare
        mov $16, %r8d
        mov $table, %rsi
        mov $128, %ecx
        rep outsw
        mov $input, %rdi
        mov $128, %ecx
        rep insw
        call compare
        mov $17, %r8d
        mov $table, %rsi
        mov $64, %ecx
        rep outsl
        mov $input, %rdi
        mov $64, %ecx
        rep insl
        call compare
        mov $18, %r8d
        mov $NOBODY, %edx
        mov $table, %rsi
        mov $16, %ecx
        rep outsb
        mov $input, %rdi
        mov $16, %ecx
        rep insb
        cmpq $0, input + 8
        jne failed
        mov %r9, %rdi
        jmp exits_round

compare:
        mov $table, %rsi
        mov $input, %rdi
        mov $256, %ecx
        repe cmpsb
        jne 1f
        movq $0, input + 96
        ret
1:      pop %rax
        jmp failed

# Endless: posted and called writes in turn, each with the next count.
storm:
        mov $POSTED, %edx
        inc %ebx; mov %ebx, %eax; outl %eax, %dx
        mov $CALLED, %edx
        inc %ebx; mov %ebx, %eax; outl %eax, %dx
        mov $READ_BACK, %edx
        inl %dx, %eax
        mov $20, %r8d
        cmp %ebx, %eax
        jne failed
        jmp storm

# Endless: the local answer, with nothing beside it.
local:
        mov $LOCAL, %edx
1:      inb %dx, %al
        jmp 1b

# Endless: no exit at all. The count shows in memory.
spin:
        incq PARAMETERS + 16
        jmp spin

# Sleeps until the timer interrupt wakes it, `rounds` times.
ticks:
        call interrupts_on
        mov $0x832, %ecx                # LVT timer: one-shot, vector 0x40
        mov $0x40, %eax
        xor %edx, %edx
        wrmsr
        mov $0x83E, %ecx                # divide by 1
        mov $0xB, %eax
        wrmsr
1:      mov $0x838, %ecx                # initial count: starts it
        mov $100000, %eax
        xor %edx, %edx
        wrmsr
        mov %rbx, %rsi
        sti
        hlt
        cli
        cmp %rbx, %rsi
        je 2f                           # woken without the interrupt
        mov $CALLED, %edx
        mov %ebx, %eax
        outl %eax, %dx
        cmp %rdi, %rbx
        jb 1b
        jmp done
2:      mov $30, %r8d
        jmp failed

# Sleeps; each device interrupt (vectors 0x50 and 0x51) is answered by an OUT of its vector and its number.
sleeper:
        call interrupts_on
        mov $DONE, %edx                 # ready
        mov $0x77, %eax
        outl %eax, %dx
1:      sti
        hlt
        jmp 1b

triple_fault:
        lidt no_idt
        mov 0x50000000, %eax            # not mapped; no handler for the page fault, nor for the double fault
        jmp failed

halt_for_good:
        cli
1:      hlt
        jmp 1b

run_device_memory:
        mov $MMIO_NOBODY, %rax
        jmp *%rax

# MMIO accesses across a page: KVM cuts them, so that odd lengths come out.
crossing:
        mov $21, %r8d
        mov $0x1122334455667788, %rax
        mov %rax, MMIO_POSTED + 0xFFD   # 3 bytes on the posted page, 5 on the called one
        mov MMIO_READ + 0xFFA, %rax     # 6 bytes of the read page, 2 of the local one
        mov $0x3344FFFFFFFFFFFF, %rcx
        cmp %rcx, %rax
        jne failed
        jmp done

done:   mov $DONE, %edx
        mov %ebx, %eax
        outl %eax, %dx
        jmp halt_for_good

failed: mov %eax, %r10d
        mov $FAILED, %edx
        mov %r8d, %eax
        outl %eax, %dx
        mov %r10d, %eax
        outl %eax, %dx
        jmp halt_for_good

interrupts_on:
        mov $0x1B, %ecx                 # x2APIC on
        rdmsr
        or $0xC00, %eax
        wrmsr
        mov $0x80F, %ecx                # spurious vector register: APIC enabled
        mov $0x1FF, %eax
        xor %edx, %edx
        wrmsr
        mov $idt, %rsi
        mov $timer, %rax
        mov $0x40, %rcx
        call gate
        mov $device_a, %rax
        mov $0x50, %rcx
        call gate
        mov $device_b, %rax
        mov $0x51, %rcx
        call gate
        lidt idt_register
        ret

gate:                                   # rax: handler, rcx: vector, rsi: table
        shl $4, %rcx
        mov %ax, (%rsi,%rcx)
        movw $CODE, 2(%rsi,%rcx)
        movw $0x8E00, 4(%rsi,%rcx)
        shr $16, %rax
        mov %ax, 6(%rsi,%rcx)
        movq $0, 8(%rsi,%rcx)
        ret

timer:  push %rax; push %rcx; push %rdx
        inc %rbx
        call end_of_interrupt
        pop %rdx; pop %rcx; pop %rax
        iretq

device_a:
        push %rax; push %rcx; push %rdx
        incl count_a
        mov count_a, %eax
        or $0x50000000, %eax
        jmp 1f
device_b:
        push %rax; push %rcx; push %rdx
        incl count_b
        mov count_b, %eax
        or $0x51000000, %eax
1:      mov $CALLED, %edx
        outl %eax, %dx
        call end_of_interrupt
        pop %rdx; pop %rcx; pop %rax
        iretq

end_of_interrupt:
        mov $0x80B, %ecx
        xor %eax, %eax
        xor %edx, %edx
        wrmsr
        ret

        .align 8
modes:  .quad exits, storm, local, spin, ticks, sleeper, triple_fault, halt_for_good, run_device_memory, crossing
idt_register:
        .word 4095
        .quad idt
no_idt: .word 0
        .quad 0

        .bss
        .align 16
idt:    .skip 4096
table:  .skip 256
input:  .skip 256
count_a:.skip 4
count_b:.skip 4
        .align 16
        .skip 4096
stack_top:
