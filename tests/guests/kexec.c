/* Starts another kernel from this one, with this one's command line: kexec KERNEL INITRAMFS
 *
 * KERNEL is a bzImage. Nothing is shut down by user space before; the kernel stops the other processors itself.
 * Does not return, unless it fails: then it says why. kexec_file_load(2), reboot(2). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int failed(const char *what)
{
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	char line[4096];
	int kernel, initramfs, source;
	ssize_t length;

	if (argc != 3) {
		fprintf(stderr, "usage: kexec KERNEL INITRAMFS\n");
		return 2;
	}
	source = open("/proc/cmdline", O_RDONLY);
	if (source < 0 || (length = read(source, line, sizeof line - 1)) < 0)
		return failed("/proc/cmdline");
	if (length > 0 && line[length - 1] == '\n')
		length--;
	line[length] = 0;
	kernel = open(argv[1], O_RDONLY);
	if (kernel < 0)
		return failed(argv[1]);
	initramfs = open(argv[2], O_RDONLY);
	if (initramfs < 0)
		return failed(argv[2]);
	if (syscall(SYS_kexec_file_load, kernel, initramfs, strlen(line) + 1, line, 0UL) != 0)
		return failed("kexec_file_load");
	syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, 0);
	return failed("reboot");
}
