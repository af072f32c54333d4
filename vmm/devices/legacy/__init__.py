"""Devices of the PC: UART, keyboard controller, interrupt controllers, timers."""
