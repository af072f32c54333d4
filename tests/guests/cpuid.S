# A program for Linux (build it at an address above mmap_min_addr), run as `cpuid LEAF SUBLEAF [LEAF SUBLEAF …]`, in
# hexadecimal without a prefix: prints a line for each pair, "leaf subleaf eax ebx ecx edx", and ends with status 0.
    .set SYS_write, 1
    .set SYS_exit, 60
    .set FIELDS, 6
    .text
    .globl _start
_start:
    mov (%rsp), %r12            # arguments that are left, the program's name not counted
    dec %r12
    lea 16(%rsp), %r13          # the next of them
1:  cmp $2, %r12
    jb 3f
    mov (%r13), %rsi
    call number
    mov %eax, fields(%rip)
    mov 8(%r13), %rsi
    call number
    mov %eax, fields+4(%rip)
    add $16, %r13
    sub $2, %r12
    mov fields(%rip), %eax
    mov fields+4(%rip), %ecx
    cpuid
    mov %eax, fields+8(%rip)
    mov %ebx, fields+12(%rip)
    mov %ecx, fields+16(%rip)
    mov %edx, fields+20(%rip)
    lea line(%rip), %rdi
    xor %r14d, %r14d
2:  lea fields(%rip), %rax
    mov (%rax,%r14,4), %eax
    call print
    inc %r14
    cmp $FIELDS, %r14
    jb 2b
    movb $'\n', -1(%rdi)        # in the place of the last blank
    lea line(%rip), %rsi
    mov %rdi, %rdx
    sub %rsi, %rdx
    mov $1, %edi
    mov $SYS_write, %eax
    syscall
    jmp 1b
3:  xor %edi, %edi
    mov $SYS_exit, %eax
    syscall

# rsi: text in lower case → eax
number:
    xor %eax, %eax
1:  movzbl (%rsi), %ecx
    test %ecx, %ecx
    jz 3f
    inc %rsi
    sub $'0', %ecx
    cmp $9, %ecx
    jbe 2f
    sub $('a' - '0' - 10), %ecx
2:  shl $4, %eax
    or %ecx, %eax
    jmp 1b
3:  ret

# eax → eight digits and a blank at rdi, which moves on
print:
    mov $8, %ecx
1:  rol $4, %eax
    mov %eax, %edx
    and $15, %edx
    lea digits(%rip), %r8
    movzbl (%r8,%rdx), %edx
    mov %dl, (%rdi)
    inc %rdi
    dec %ecx
    jnz 1b
    movb $' ', (%rdi)
    inc %rdi
    ret

    .section .rodata
digits:
    .ascii "0123456789abcdef"
    .bss
    .balign 4
fields:
    .skip 4 * FIELDS
line:
    .skip 9 * FIELDS
