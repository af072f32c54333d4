# A guest whose virtio drivers run outside of it: a test writes the rings into its memory, and asks by a mailbox for what
# only a vCPU can do, 32-bit reads and writes of device registers. It looks at the mailbox for ever.
# Interrupts with vector VECTOR + n are those of the n-th virtio-mmio window: counted, and acknowledged there.
# REPEAT lets the driver's steady state run in here: what has come back in queue 0 of the first window is offered again,
# with EVENT_IDX on both sides, waiting halted, until COUNT chains have come back or STOP is not 0.
        .set    CPUS, 1
        .include "smp.inc"

        .set    VECTOR, 0x50
        .set    WINDOWS, 0xc0001000
        .set    MAILBOX, 0x81000        # number, operation, address, value; the answer: number, value
        .set    ANSWER, 0x81010
        .set    REPEAT, 0x81040         # available ring, used ring, queue size, COUNT, STOP; chains, kicks, waits; SEEN
        .set    INTERRUPTS, 0x81080     # of each window: interrupts, changes of the configuration

        .set    AVAILABLE, REPEAT
        .set    USED, REPEAT + 4
        .set    SIZE, REPEAT + 8
        .set    COUNT, REPEAT + 12
        .set    STOP, REPEAT + 16
        .set    CHAINS, REPEAT + 20
        .set    KICKS, REPEAT + 24
        .set    WAITS, REPEAT + 28
        .set    SEEN, REPEAT + 32       # used index
        .set    BEFORE, REPEAT + 36

main:   mov     MAILBOX, %ebp
        cmp     %ebp, ANSWER
        jne     1f
        pause
        jmp     main
1:      mov     MAILBOX + 8, %edi
        mov     MAILBOX + 12, %eax
        cmpl    $1, MAILBOX + 4
        je      3f
        cmpl    $2, MAILBOX + 4
        je      repeat
        cmpl    $3, MAILBOX + 4
        je      finish
        mov     (%edi), %eax
        mov     %eax, ANSWER + 4
        jmp     answer
3:      mov     %eax, (%edi)
answer: mov     %ebp, ANSWER
        jmp     main

finish: mov     $text, %esi
        jmp     end

# ESI: available ring, EDI: used ring, EBX: mask, EDX: used index seen (16 bits).
repeat: mov     AVAILABLE, %esi
        mov     USED, %edi
        mov     SIZE, %ebx
        dec     %ebx
        movzwl  SEEN, %edx
next:   mov     SIZE, %eax
        mov     %dx, 4(%esi, %eax, 2)   # used_event
        lock addl $0, (%esp)
1:      cli
        cmp     %dx, 2(%edi)
        jne     2f
        incl    WAITS
        sti
        hlt
        cmpl    $0, STOP
        jne     answer
        jmp     1b
2:      sti
        movzwl  2(%esi), %ecx
        mov     %ecx, BEFORE
3:      mov     %edx, %eax              # what has come back goes out again
        and     %ebx, %eax
        mov     4(%edi, %eax, 8), %eax
        push    %ecx
        and     %ebx, %ecx
        mov     %ax, 4(%esi, %ecx, 2)
        pop     %ecx
        inc     %ecx
        mov     %cx, 2(%esi)
        inc     %edx
        incl    CHAINS
        cmp     %dx, 2(%edi)
        jne     3b
        lock addl $0, (%esp)
        mov     SIZE, %eax
        movzwl  4(%edi, %eax, 8), %eax  # avail_event
        push    %edx
        mov     %ecx, %edx              # new - event - 1 < new - old
        sub     %eax, %edx
        dec     %edx
        movzwl  %dx, %edx
        mov     %ecx, %eax
        sub     BEFORE, %eax
        movzwl  %ax, %eax
        cmp     %eax, %edx
        pop     %edx
        jae     4f
        incl    KICKS
        movl    $0, WINDOWS + 0x50
4:      mov     CHAINS, %eax
        cmp     COUNT, %eax
        jb      next
        jmp     answer

handler:
        pusha
        mov     32(%esp), %ebx
        sub     $VECTOR, %ebx
        cmp     $32, %ebx
        jae     2f
        mov     %ebx, %edi
        shl     $12, %edi
        mov     WINDOWS + 0x60(%edi), %eax
        test    $2, %eax
        jz      1f
        incl    INTERRUPTS + 4(, %ebx, 8)
1:      mov     %eax, WINDOWS + 0x64(%edi)
        incl    INTERRUPTS(, %ebx, 8)
        jmp     acknowledge
2:      mov     $fault, %esi
        jmp     end

fail:   mov     $fault, %esi
        jmp     end

        smp_data
        .data
text:   .asciz  "MAILBOX END\n"
fault:  .asciz  "MAILBOX FAIL\n"
