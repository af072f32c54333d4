/* The flat loop of virtio/block/flat.py without the interpreter lock. Optional: Python does the same and more.
 *
 * It serves requests of one shape: an indirect table in order, a header of 16 bytes, 1 to MAX_PARTS buffers of whole
 * sectors together, a status of one byte. A head that leads to anything else, or whose transfer was not whole, is
 * handed back: Python serves it and calls go_on(). What the guest can change is copied once and checked then; words
 * that both sides race on are atomic loads and stores. Layouts: virtio 1.2, 2.7 and 5.2.6.
 *
 * serve(budget) and go_on() return the number of chains of the batch, plus WANTED if the driver is to be told; or
 * -1 - head; or BROKEN. virtio.queue.Queue keeps the counters: they are read at each begin and written at each end. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include <sys/uio.h>
#include <time.h>

enum { MAX_PARTS = 64, MAX_DESCRIPTORS = MAX_PARTS + 2, MAX_SPANS = 16, MAX_SIZE = 32768 };
enum { WANTED = 1 << 16, BROKEN = -(1 << 17) };
enum { INDEX = 1, RING = 2 };
enum { IN, OUT, KINDS };
enum { AVAILABLE, USED, SIGNALLED, COUNTERS };
static const char *const names[COUNTERS] = {"next_available", "next_used", "_signalled"};

static const uint64_t NEXT = 1ULL << 32, WRITE = 2ULL << 32, INDIRECT = 4ULL << 32, NO_NEXT = (1ULL << 48) - 1;
static const uint64_t HEADER = 16, STATUS = 1, SECTOR = 512, MAX_TRANSFER = 0x7ffff000; /* of one preadv(2) */

struct span { uint64_t start, end, shift; };
struct words { uint64_t of[2 * MAX_DESCRIPTORS]; };
struct header { uint64_t type, sector; };
_Static_assert(sizeof(struct header) == 16, "virtio 1.2, 5.2.6");
_Static_assert(sizeof(struct words) == 16 * MAX_DESCRIPTORS, "virtio 1.2, 2.7.5: two words each");
struct tally { uint64_t count, bytes, total_ns, most_ns, least_ns; };

typedef struct {
    PyObject_HEAD
    Py_buffer view;
    PyObject *queue;
    PyObject **slots[COUNTERS]; /* where the queue keeps them */
    const uint64_t *descriptors;
    uint16_t *available, *used;
    uint64_t sectors, begun_ns;
    struct span spans[MAX_SPANS];
    Py_ssize_t span_count;
    uint32_t size;
    int file, event_idx, indirect, read_only;
    uint32_t batch, left; /* chains of this batch, and those not begun */
    uint16_t counters[COUNTERS];
    struct tally now[KINDS], sum[KINDS];
} Loop;

static uint16_t load16(const uint16_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static void store16(uint16_t *word, uint16_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* `length` bytes of RAM at a guest address, all in one region; NULL: they are not. */
static uint8_t *at(const Loop *s, uint64_t address, uint64_t length)
{
    for (Py_ssize_t i = 0; i < s->span_count; i++) {
        const struct span *p = &s->spans[i];
        if (address >= p->start && address <= p->end && length <= p->end - address)
            return (uint8_t *)s->view.buf + (address + p->shift);
    }
    return NULL;
}

/* Copies an indirect table; returns its descriptors, 0: not the common shape. */
static unsigned table(const Loop *s, uint16_t head, struct words *copy)
{
    if (head >= s->size || !s->indirect) return 0;
    uint64_t address = __atomic_load_n(&s->descriptors[2 * head], __ATOMIC_RELAXED);
    uint64_t word = __atomic_load_n(&s->descriptors[2 * head + 1], __ATOMIC_RELAXED);
    uint32_t length = (uint32_t)word;
    unsigned count = length / 16;
    if ((word & NO_NEXT) != (length | INDIRECT) || length % 16) return 0;
    const uint8_t *source = at(s, address, length);
    if (!source || count < 3 || count > MAX_DESCRIPTORS || count > s->size) return 0;
    memcpy(copy, source, length);
    __asm__ volatile("" : "+m"(*copy)); /* it is the copy that is read from here on */
    return count;
}

static int serve_one(Loop *s, uint16_t head)
{
    struct words copy;
    struct iovec parts[MAX_PARTS];
    struct header header;
    unsigned last = table(s, head, &copy);
    if (!last--) return 0;
    const uint64_t *words = copy.of;
    if (words[1] != (HEADER | NEXT | 1ULL << 48) || (words[2 * last + 1] & NO_NEXT) != (STATUS | WRITE)) return 0;
    const uint8_t *source = at(s, words[0], HEADER);
    uint8_t *status = at(s, words[2 * last], STATUS);
    if (!source || !status) return 0;
    memcpy(&header, source, sizeof header);
    __asm__ volatile("" : "+m"(header));
    uint32_t type = (uint32_t)header.type;
    if (type > OUT || (type == OUT && s->read_only)) return 0;
    uint64_t flags = type == IN ? NEXT | WRITE : NEXT, total = 0;
    for (unsigned i = 1; i < last; i++) {
        uint32_t length = (uint32_t)words[2 * i + 1];
        uint8_t *data = at(s, words[2 * i], length);
        if (!data || !length || words[2 * i + 1] != (length | flags | (uint64_t)(i + 1) << 48)) return 0;
        parts[i - 1] = (struct iovec){data, length};
        total += length;
    }
    uint64_t first = header.sector, sectors = total / SECTOR;
    if (total % SECTOR || total > MAX_TRANSFER || first > s->sectors || sectors > s->sectors - first) return 0;
    off_t offset = (off_t)(first * SECTOR);
    int count = (int)last - 1;
    ssize_t done = type == IN ? preadv2(s->file, parts, count, offset, 0) : pwritev2(s->file, parts, count, offset, 0);
    if (done < 0 || (uint64_t)done != total) return 0; /* Python tries again, and says what it was */
    __atomic_store_n(status, 0, __ATOMIC_RELAXED);
    uint32_t *element = (uint32_t *)(s->used + RING) + 2 * (s->counters[USED]++ & (s->size - 1));
    __atomic_store_n(&element[0], head, __ATOMIC_RELAXED);
    __atomic_store_n(&element[1], type == IN ? (uint32_t)total + 1 : 1, __ATOMIC_RELAXED);
    s->now[type].count++;
    s->now[type].bytes += total;
    return 1;
}

/* The used index out; whether the driver wants to know: Queue.publish(). */
static int publish(Loop *s)
{
    uint16_t old = s->counters[SIGNALLED], new = s->counters[USED];
    if (old == new) return 0;
    store16(&s->used[INDEX], s->counters[SIGNALLED] = new);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (s->event_idx) return (uint16_t)(new - load16(&s->available[RING + s->size]) - 1) < (uint16_t)(new - old);
    return !(load16(&s->available[0]) & 1);
}

static void count_batch(Loop *s)
{
    uint64_t elapsed = clock_ns() - s->begun_ns;
    for (int kind = IN; kind < KINDS; kind++) {
        struct tally *now = &s->now[kind], *sum = &s->sum[kind];
        if (!now->count) continue;
        uint64_t mean = elapsed / now->count;
        sum->count += now->count;
        sum->bytes += now->bytes;
        sum->total_ns += elapsed;
        if (mean > sum->most_ns) sum->most_ns = mean;
        if (mean < sum->least_ns) sum->least_ns = mean;
    }
}

static long run(Loop *s)
{
    while (s->left) {
        uint16_t head = load16(&s->available[RING + (s->counters[AVAILABLE]++ & (s->size - 1))]);
        s->left--;
        if (!serve_one(s, head)) return -1 - (long)head;
    }
    int wanted = publish(s);
    count_batch(s);
    return (long)s->batch + (wanted ? WANTED : 0);
}

/* The queue's counters: next_available, next_used, _signalled. */
static int read_counters(Loop *s)
{
    if (!s->queue) { PyErr_SetString(PyExc_ValueError, "not set up"); return -1; }
    for (int i = 0; i < COUNTERS; i++) s->counters[i] = (uint16_t)(*s->slots[i] ? PyLong_AsLong(*s->slots[i]) : 0);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *finish(Loop *s)
{
    long result;
    Py_BEGIN_ALLOW_THREADS
    result = run(s);
    Py_END_ALLOW_THREADS
    for (int i = 0; i < COUNTERS; i++) {
        PyObject *number = PyLong_FromLong(s->counters[i]);
        if (!number) return NULL;
        Py_XSETREF(*s->slots[i], number);
    }
    return PyLong_FromLong(result);
}

static PyObject *loop_serve(Loop *s, PyObject *argument)
{
    long budget = PyLong_AsLong(argument);
    if (PyErr_Occurred() || read_counters(s)) return NULL;
    uint16_t count = load16(&s->available[INDEX]) - s->counters[AVAILABLE];
    if (!count || budget <= 0) return PyLong_FromLong(0);
    if (count > s->size) return PyLong_FromLong(BROKEN);
    s->begun_ns = clock_ns();
    memset(s->now, 0, sizeof s->now);
    s->batch = s->left = count < budget ? count : (uint32_t)budget;
    return finish(s);
}

static PyObject *loop_go_on(Loop *s, PyObject *Py_UNUSED(ignored)) { return read_counters(s) ? NULL : finish(s); }

static PyObject *loop_arm(Loop *s, PyObject *Py_UNUSED(ignored))
{
    if (read_counters(s)) return NULL;
    if (s->event_idx) {
        store16(&s->used[RING + 4 * s->size], s->counters[AVAILABLE]); /* avail_event */
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }
    return PyBool_FromLong(load16(&s->available[INDEX]) != s->counters[AVAILABLE]);
}

static PyObject *loop_take(Loop *s, PyObject *Py_UNUSED(ignored))
{
    struct tally r = s->sum[IN], w = s->sum[OUT];
    s->sum[IN] = s->sum[OUT] = (struct tally){.least_ns = UINT64_MAX};
    return Py_BuildValue("(KKKKK)(KKKKK)", r.count, r.bytes, r.total_ns, r.most_ns, r.least_ns,
                         w.count, w.bytes, w.total_ns, w.most_ns, w.least_ns);
}

/* Find where the queue keeps its counters: in __slots__. */
static int find_slots(Loop *s, PyObject *queue)
{
    for (int i = 0; i < COUNTERS; i++) {
        PyObject *found = PyObject_GetAttrString((PyObject *)Py_TYPE(queue), names[i]);
        if (!found) return -1;
        PyMemberDef *member = Py_IS_TYPE(found, &PyMemberDescr_Type) ? ((PyMemberDescrObject *)found)->d_member : NULL;
        int is_slot = member && member->type == T_OBJECT_EX;
        if (is_slot) s->slots[i] = (PyObject **)((char *)queue + member->offset);
        else PyErr_Format(PyExc_TypeError, "%s is no slot", names[i]);
        Py_DECREF(found);
        if (!is_slot) return -1;
    }
    return 0;
}

static int take_spans(Loop *s, PyObject *spans)
{
    s->span_count = PyTuple_GET_SIZE(spans);
    if (s->span_count > MAX_SPANS) return -1;
    for (Py_ssize_t i = 0; i < s->span_count; i++) {
        struct span *p = &s->spans[i];
        long long shift; /* from a guest address to its offset: negative where RAM lies above a hole */
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(spans, i), "KKL", &p->start, &p->end, &shift)) return -1;
        p->shift = (uint64_t)shift;
        if (p->start > p->end || p->start + p->shift > (uint64_t)s->view.len
            || p->end - p->start > (uint64_t)s->view.len - (p->start + p->shift)) return -1;
    }
    return 0;
}

static int loop_init(Loop *s, PyObject *args, PyObject *keywords)
{
    unsigned long long descriptors, available, used;
    PyObject *spans, *queue;
    if (keywords || s->view.buf) { PyErr_SetString(PyExc_TypeError, "set up once, by position"); return -1; }
    if (!PyArg_ParseTuple(args, "w*O!OKKKIppiKp", &s->view, &PyTuple_Type, &spans, &queue, &descriptors, &available,
        &used, &s->size, &s->event_idx, &s->indirect, &s->file, &s->sectors, &s->read_only)) return -1;
    uint64_t n = s->size;
    if (!n || n > MAX_SIZE || (n & (n - 1)) || (descriptors & 15) || (available & 1) || (used & 3)
        || take_spans(s, spans) || !at(s, descriptors, 16 * n) || !at(s, available, 6 + 2 * n)
        || !at(s, used, 6 + 8 * n)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a queue that is not in guest memory");
        return -1;
    }
    s->descriptors = (const uint64_t *)at(s, descriptors, 16 * n);
    s->available = (uint16_t *)at(s, available, 6 + 2 * n), s->used = (uint16_t *)at(s, used, 6 + 8 * n);
    s->sum[IN] = s->sum[OUT] = (struct tally){.least_ns = UINT64_MAX};
    if (find_slots(s, queue)) return -1;
    Py_INCREF(s->queue = queue);
    return 0;
}

static void loop_dealloc(Loop *s)
{
    Py_CLEAR(s->queue);
    if (s->view.buf) PyBuffer_Release(&s->view);
    Py_TYPE(s)->tp_free((PyObject *)s);
}

static PyMethodDef methods[] = {
    {"serve", (PyCFunction)loop_serve, METH_O, "serve(budget): begin a batch."},
    {"go_on", (PyCFunction)loop_go_on, METH_NOARGS, "Go on with the batch behind a head that Python has served."},
    {"arm", (PyCFunction)loop_arm, METH_NOARGS, "As Queue.arm()."},
    {"take", (PyCFunction)loop_take, METH_NOARGS, "(count, bytes, total, most, least ns) of reads, of writes; once."},
    {NULL, NULL, 0, NULL}};
static PyTypeObject LoopType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "_loops.BlockLoop", .tp_basicsize = sizeof(Loop),
    .tp_flags = Py_TPFLAGS_DEFAULT, .tp_new = PyType_GenericNew, .tp_init = (initproc)loop_init,
    .tp_dealloc = (destructor)loop_dealloc, .tp_methods = methods};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_loops", .m_size = -1};

PyMODINIT_FUNC PyInit__loops(void)
{
    PyObject *made = PyType_Ready(&LoopType) ? NULL : PyModule_Create(&module);
    if (made && (PyModule_AddType(made, &LoopType) || PyModule_AddIntMacro(made, WANTED)
                 || PyModule_AddIntMacro(made, BROKEN) || PyModule_AddIntMacro(made, MAX_SPANS))) Py_CLEAR(made);
    return made;
}
