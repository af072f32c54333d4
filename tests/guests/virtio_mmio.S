# A driver of the entropy device, by virtio-mmio: it probes the first window, negotiates, sets a queue up, and makes requests,
# each announced by the doorbell and ended by an interrupt, which is acknowledged. After ROUNDS of them it resets the device
# and begins anew, for ever. What it has done stands in memory, so that nobody needs an exit to know: see PROGRESS.
# The processor DRIVER makes the requests, TARGET gets the interrupts; the driver waits halted if it is the same one.
# A fault ends the machine: COM1 gets "FAIL", then it is reset.
# Symbols, which may be set from outside: CPUS, ROUNDS, DRIVER, TARGET.
        .include "smp.inc"
        default ROUNDS, 100
        default DRIVER, 0
        default TARGET, 0

        .set    VECTOR, 0x51
        .set    GO, 0x61
        .set    DEVICE, 0xc0001000
        .set    GSI, 5
        .set    IOAPIC, 0xfec00000
        .set    PROGRESS, 0x80000       # requests, interrupts, configuration changes, lives
        .set    TABLE, 0x300000         # the queue's three parts, and the buffer
        .set    AVAILABLE, 0x301000
        .set    USED, 0x302000
        .set    BUFFER, 0x303000
        .set    LENGTH, 64
        .set    QUEUE, 8

        .macro  expect offset, value
        mov     DEVICE + \offset, %eax
        cmp     $\value, %eax
        jne     fail
        .endm
        .macro  set offset, value
        movl    $\value, DEVICE + \offset
        .endm
        .macro  step status
        set     0x70, \status
        expect  0x70, \status
        .endm

main:   .if     CPUS > 1
        call    start_processors
        .endif
        movl    $0x10 + 2 * GSI + 1, IOAPIC
        movl    $TARGET << 24, IOAPIC + 0x10
        movl    $0x10 + 2 * GSI, IOAPIC
        movl    $VECTOR, IOAPIC + 0x10
        .if     DRIVER
        mov     $GO, %eax
        mov     $DRIVER, %edx
        call    send
1:      hlt
        jmp     1b
        .else
        jmp     drive
        .endif

drive:  expect  0x000, 0x74726976
        expect  0x004, 2
        expect  0x008, 4
        step    0
        expect  0x060, 0
        step    1
        step    3
        set     0x14, 0                 # the features it offers: EVENT_IDX is left
        mov     DEVICE + 0x10, %eax
        test    $1 << 29, %eax
        jz      fail
        set     0x14, 1
        expect  0x10, 1                 # VERSION_1
        set     0x24, 0
        set     0x20, 0
        set     0x24, 1
        set     0x20, 1
        step    11
        set     0x30, 1                 # there is no second queue
        expect  0x34, 0
        set     0x30, 0
        expect  0x34, 256
        expect  0x44, 0
        set     0x38, QUEUE
        set     0x80, TABLE
        set     0x84, 0
        set     0x90, AVAILABLE
        set     0x94, 0
        set     0xa0, USED
        set     0xa4, 0
        mov     $AVAILABLE, %edi
        xor     %eax, %eax
        mov     $0x800, %ecx            # both rings
        rep stosl
        set     0x44, 1
        expect  0x44, 1
        movl    $BUFFER, TABLE
        movl    $0, TABLE + 4
        movl    $LENGTH, TABLE + 8
        movl    $2, TABLE + 12          # the device writes; it is the only one
        step    15

        xor     %ebp, %ebp              # requests of this life
request:
        movl    $0, BUFFER
        movl    $0, BUFFER + 4
        movl    $0, BUFFER + LENGTH - 4
        inc     %ebp
        movw    %bp, AVAILABLE + 2      # every entry of the ring is descriptor 0
        set     0x50, 0
1:      cli
        movw    USED + 2, %ax
        cmp     %ax, %bp
        je      2f
        .if     DRIVER == TARGET
        sti
        hlt
        .else
        sti
        pause
        .endif
        jmp     1b
2:      sti
        mov     %ebp, %eax
        dec     %eax
        and     $QUEUE - 1, %eax
        cmpl    $0, USED + 4(, %eax, 8)
        jne     fail
        cmpl    $LENGTH, USED + 8(, %eax, 8)
        jne     fail
        mov     BUFFER, %eax            # 96 random bits are 0 never
        or      BUFFER + 4, %eax
        or      BUFFER + LENGTH - 4, %eax
        jz      fail
        incl    PROGRESS
        cmp     $ROUNDS, %ebp
        jb      request
        incl    PROGRESS + 12
        jmp     drive

fail:   mov     $fail_text, %esi
        jmp     end

handler:
        pusha
        mov     32(%esp), %ebx
        .if     DRIVER
        cmp     $GO, %ebx
        jne     1f
        mov     $EOI, %ecx
        xor     %eax, %eax
        xor     %edx, %edx
        wrmsr
        sti
        jmp     drive
        .endif
1:      cmp     $VECTOR, %ebx
        jne     fail
        mov     DEVICE + 0x60, %eax
        test    $2, %eax
        jz      2f
        incl    PROGRESS + 8
2:      mov     %eax, DEVICE + 0x64
        incl    PROGRESS + 4
        jmp     acknowledge

        smp_data
        .data
fail_text:
        .asciz  "VIRTIO FAIL\n"
