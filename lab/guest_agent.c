/*
 * Runs shell commands in a guest for its host's side (lab/guest_agent.py), over standard input and output: a console, a
 * pipe or a connection. Lines from the host:
 *     run ID BASE64        run a shell command; ID: 1 to 2^31 - 1, not in use
 *     kill ID SIGNAL       send a signal to a command and all that it has started in its session
 *     quit                 end when no command runs any more; at the end of its input it kills what runs, and ends
 * Lines to the host, each in one piece:
 *     CELLBLOCK-AGENT ready 1
 *     CELLBLOCK-AGENT out ID BASE64                      what it wrote to standard output
 *     CELLBLOCK-AGENT err ID BASE64                      and to standard error
 *     CELLBLOCK-AGENT exit ID STATUS OUT-BYTES ERR-BYTES as a shell says it: 128 + N for signal N
 *     CELLBLOCK-AGENT refused ID REASON
 *     CELLBLOCK-AGENT ended                              after quit: the terminal is as it was before
 * Commands run beside each other. Static, without a runtime: it starts in milliseconds in an emulated machine.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/pidfd.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { COMMANDS = 16, LONGEST_LINE = 65536, CHUNK = 3072, STREAMS = 2, LAST_CHUNKS = 64 };

struct command {
    int id; /* 0: this place is free */
    pid_t pid;
    int pidfd;
    int pipe[STREAMS]; /* -1: at its end */
    unsigned long long bytes[STREAMS];
};

static struct command commands[COMMANDS];
static char line[LONGEST_LINE];
static size_t line_length;
static int line_too_long, quitting;
static const char *const stream_names[STREAMS] = {"out", "err"};

static void end(int status);

static void write_all(const char *data, size_t length)
{
    while (length > 0) {
        ssize_t written = write(STDOUT_FILENO, data, length);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            end(1);
        data += written;
        length -= (size_t)written;
    }
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    static char text[64 + (CHUNK + 2) / 3 * 4];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text - 1, format, arguments);
    va_end(arguments);
    if (length < 0 || (size_t)length >= sizeof text - 1)
        abort();
    text[length] = '\n';
    write_all(text, (size_t)length + 1);
}

static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static void encode(const unsigned char *data, size_t length, char *text)
{
    for (size_t at = 0; at < length; at += 3) {
        size_t left = length - at;
        unsigned bits = (unsigned)data[at] << 16 | (left > 1 ? (unsigned)data[at + 1] << 8 : 0) | (left > 2 ? data[at + 2] : 0);
        *text++ = digits[bits >> 18];
        *text++ = digits[bits >> 12 & 63];
        *text++ = left > 1 ? digits[bits >> 6 & 63] : '=';
        *text++ = left > 2 ? digits[bits & 63] : '=';
    }
    *text = 0;
}

/* Decodes in place; returns 0 for what is no base64. */
static int decode(char *text)
{
    unsigned bits = 0;
    int count = 0;
    char *to = text;
    for (const char *from = text; *from && *from != '='; from++) {
        const char *digit = strchr(digits, *from);
        if (digit == NULL)
            return 0;
        bits = bits << 6 | (unsigned)(digit - digits);
        count += 6;
        if (count >= 8) {
            count -= 8;
            *to++ = (char)(bits >> count);
        }
    }
    *to = 0;
    return 1;
}

static struct command *find(int id)
{
    for (struct command *each = commands; each < commands + COMMANDS; each++)
        if (each->id == id)
            return each;
    return NULL;
}

static void become(const char *shell_command, int pipes[STREAMS][2])
{
    setsid();
    int nothing = open("/dev/null", O_RDONLY);
    dup2(nothing, STDIN_FILENO);
    dup2(pipes[0][1], STDOUT_FILENO);
    dup2(pipes[1][1], STDERR_FILENO);
    close(nothing);
    execl("/bin/sh", "sh", "-c", shell_command, (char *)NULL);
    _exit(127);
}

static void run(int id, char *text)
{
    struct command *place = find(0);
    int pipes[STREAMS][2];
    if (id <= 0 || find(id) != NULL || !decode(text)) {
        say("CELLBLOCK-AGENT refused %d the number is taken or the text is no base64", id);
        return;
    }
    if (place == NULL || quitting) {
        say("CELLBLOCK-AGENT refused %d %s", id, quitting ? "it is ending" : "too many commands run");
        return;
    }
    if (pipe2(pipes[0], O_CLOEXEC) < 0 || pipe2(pipes[1], O_CLOEXEC) < 0 || (place->pid = fork()) < 0) {
        say("CELLBLOCK-AGENT refused %d %s", id, strerror(errno)); /* no descriptor or memory is left: it stays so */
        return;
    }
    if (place->pid == 0)
        become(text, pipes);
    for (int stream = 0; stream < STREAMS; stream++) {
        close(pipes[stream][1]);
        fcntl(pipes[stream][0], F_SETFL, O_NONBLOCK);
        place->pipe[stream] = pipes[stream][0];
        place->bytes[stream] = 0;
    }
    place->pidfd = pidfd_open(place->pid, 0);
    if (place->pidfd < 0)
        abort();
    fcntl(place->pidfd, F_SETFD, FD_CLOEXEC);
    place->id = id;
}

static void send_signal(const struct command *command, int number)
{
    if (kill(-command->pid, number) < 0)
        kill(command->pid, number); /* it has no session of its own yet */
}

/* The host's side is gone: nobody would ever learn of what runs. */
static void end(int status)
{
    for (const struct command *each = commands; each < commands + COMMANDS; each++)
        if (each->id)
            send_signal(each, SIGKILL);
    exit(status);
}

static void obey(char *text)
{
    int id = 0, number = 0, at = 0;
    struct command *command;
    if (sscanf(text, "run %d %n", &id, &at) == 1 && at > 0)
        run(id, text + at);
    else if (sscanf(text, "kill %d %d", &id, &number) == 2 && id > 0 && (command = find(id)) != NULL)
        send_signal(command, number);
    else if (strcmp(text, "quit") == 0)
        quitting = 1;
    else if (*text)
        say("CELLBLOCK-AGENT refused %d no such order, or no such command", id);
}

static void take_orders(void)
{
    char data[4096];
    ssize_t length = read(STDIN_FILENO, data, sizeof data);
    if (length < 0 && errno == EINTR)
        return;
    if (length <= 0)
        end(0);
    for (ssize_t at = 0; at < length; at++) {
        if (data[at] != '\n' && data[at] != '\r') {
            if (line_length < sizeof line - 1)
                line[line_length++] = data[at];
            else
                line_too_long = 1;
            continue;
        }
        line[line_length] = 0;
        if (line_too_long)
            say("CELLBLOCK-AGENT refused 0 the line is longer than %d bytes", LONGEST_LINE - 1);
        else
            obey(line);
        line_length = 0;
        line_too_long = 0;
    }
}

/* Passes on one piece of what a command wrote; returns whether there may be more now. */
static int pass_on(struct command *command, int stream)
{
    static unsigned char data[CHUNK];
    static char text[(CHUNK + 2) / 3 * 4 + 1];
    if (command->pipe[stream] < 0)
        return 0;
    ssize_t length = read(command->pipe[stream], data, sizeof data);
    if (length < 0 && (errno == EAGAIN || errno == EINTR))
        return errno == EINTR;
    if (length <= 0) {
        close(command->pipe[stream]);
        command->pipe[stream] = -1;
        return 0;
    }
    encode(data, (size_t)length, text);
    command->bytes[stream] += (unsigned long long)length;
    say("CELLBLOCK-AGENT %s %d %s", stream_names[stream], command->id, text);
    return 1;
}

/* What it started and left running may hold the pipes: what is in them now is all that counts. */
static void finish(struct command *command)
{
    int status;
    for (int stream = 0; stream < STREAMS; stream++) {
        for (int left = LAST_CHUNKS; left > 0 && pass_on(command, stream); left--)
            ;
        if (command->pipe[stream] >= 0)
            close(command->pipe[stream]);
    }
    waitpid(command->pid, &status, 0);
    close(command->pidfd);
    say("CELLBLOCK-AGENT exit %d %d %llu %llu", command->id,
        WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status), command->bytes[0], command->bytes[1]);
    command->id = 0;
}

/* Waits for something and deals with it; returns 0 when there is nothing more to do. */
static int turn(void)
{
    struct pollfd wanted[1 + COMMANDS * (STREAMS + 1)] = {{.fd = STDIN_FILENO, .events = POLLIN}};
    int running = 0;
    for (int number = 0; number < COMMANDS; number++) {
        struct pollfd *its = wanted + 1 + number * (STREAMS + 1);
        const struct command *command = commands + number;
        running += command->id != 0;
        its[0] = (struct pollfd){.fd = command->id ? command->pidfd : -1, .events = POLLIN};
        for (int stream = 0; stream < STREAMS; stream++)
            its[1 + stream] = (struct pollfd){.fd = command->id ? command->pipe[stream] : -1, .events = POLLIN};
    }
    if (quitting && running == 0)
        return 0;
    if (poll(wanted, sizeof wanted / sizeof *wanted, -1) < 0)
        return errno == EINTR;
    for (int number = 0; number < COMMANDS; number++) {
        struct pollfd *its = wanted + 1 + number * (STREAMS + 1);
        for (int stream = 0; stream < STREAMS; stream++)
            if (its[1 + stream].revents)
                pass_on(commands + number, stream);
        if (its[0].revents)
            finish(commands + number);
    }
    if (wanted[0].revents)
        take_orders();
    return 1;
}

int main(void)
{
    struct termios before, raw;
    int terminal = tcgetattr(STDIN_FILENO, &before) == 0;
    signal(SIGPIPE, SIG_IGN);
    if (terminal) {
        raw = before;
        cfmakeraw(&raw);
        tcsetattr(STDIN_FILENO, TCSANOW, &raw);
        klogctl(8, NULL, 1); /* the kernel's messages would come between our lines; dmesg has them */
        write_all("\n", 1); /* a shell's control characters may stand before us */
    }
    say("CELLBLOCK-AGENT ready 1");
    while (turn())
        ;
    if (terminal)
        tcsetattr(STDIN_FILENO, TCSADRAIN, &before);
    say("CELLBLOCK-AGENT ended");
    return 0;
}
