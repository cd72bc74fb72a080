/* Many small files in one call: written, named and read without the interpreter's lock.

   In Python each of a file's system calls gives the lock away and waits until it has it again, behind the reactor's
   thread, which decodes what comes next.  Nothing is decided here: whether a file may be written, what it may be called
   and what became of it is `protoframe.files._small`'s, which does the same without this module where it was not built.

   What goes wrong with a file is returned for that file; nothing is raised but for wrong arguments and lack of memory. */

#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* What is read back is not what was written. */
#define DIFFERS (-65536)

/* A list of tuples as a tuple of its own, so that nobody changes it meanwhile, and room for as many records. */
static PyObject *
own_tuple(PyObject *list, size_t size, void **records)
{
    PyObject *tuple = PyList_AsTuple(list);
    if (tuple == NULL)
        return NULL;
    for (Py_ssize_t at = 0; at < PyTuple_Size(tuple); at++)
        if (!PyTuple_Check(PyTuple_GetItem(tuple, at))) {
            PyErr_SetString(PyExc_TypeError, "each file is a tuple");
            Py_DECREF(tuple);
            return NULL;
        }
    *records = PyMem_Calloc((size_t)PyTuple_Size(tuple) + 1, size);
    if (*records == NULL) {
        Py_DECREF(tuple);
        return PyErr_NoMemory();
    }
    return tuple;
}

struct written {
    Py_buffer data;
    unsigned int mode;
    long long mtime_ns;
    int result;
};

static struct timespec
timespec_of(long long ns)
{
    struct timespec time = {ns / 1000000000, ns % 1000000000};
    if (time.tv_nsec < 0) {
        time.tv_sec -= 1;
        time.tv_nsec += 1000000000;
    }
    return time;
}

/* Reads from the beginning of a file until there is no more, or so much; -1 with errno where that fails. */
static ssize_t
read_all(int fd, char *into, size_t most)
{
    size_t got = 0;
    while (got < most) {
        ssize_t more = pread(fd, into + got, most - got, (off_t)got);
        if (more < 0 && errno == EINTR)
            continue;
        if (more < 0)
            return -1;
        if (more == 0)
            break;
        got += (size_t)more;
    }
    return (ssize_t)got;
}

static int
write_all(int fd, const char *data, size_t length)
{
    size_t done = 0;
    while (done < length) {
        ssize_t more = pwrite(fd, data + done, length - done, (off_t)done);
        if (more < 0 && errno == EINTR)
            continue;
        if (more < 0)
            return -errno;
        if (more == 0)
            return -ENOSPC;
        done += (size_t)more;
    }
    return 0;
}

/* Fills a new file, and looks whether what it has now is what it was given; `back` has room for one byte more. */
static int
fill(int fd, const struct written *file, char *back)
{
    struct stat status;
    size_t length = (size_t)file->data.len;
    struct timespec times[2] = {timespec_of(file->mtime_ns), timespec_of(file->mtime_ns)};
    ssize_t got;
    int result;

    /* A second that this system cannot say. */
    if (times[0].tv_sec > file->mtime_ns / 1000000000 || times[0].tv_sec < file->mtime_ns / 1000000000 - 1)
        return -EOVERFLOW;
    if (fstat(fd, &status) != 0)
        return -errno;
    /* The process's mask may have taken something from it. */
    if ((status.st_mode & 0777) != file->mode && fchmod(fd, file->mode) != 0)
        return -errno;
    result = write_all(fd, file->data.buf, length);
    if (result != 0)
        return result;
    got = read_all(fd, back, length + 1);
    if (got < 0)
        return -errno;
    if ((size_t)got != length || memcmp(back, file->data.buf, length) != 0)
        return DIFFERS;
    return futimens(fd, times) == 0 ? 0 : -errno;
}

static int
write_one(int directory, const struct written *file, char *back)
{
    int result;
    int fd = openat(directory, ".", O_RDWR | O_TMPFILE | O_CLOEXEC, file->mode);

    if (fd < 0)
        return -errno;
    result = fill(fd, file, back);
    if (result == 0)
        return fd;
    close(fd);
    return result;
}

static PyObject *
results_of(const int *results, size_t stride, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t at = 0; list != NULL && at < count; at++) {
        PyObject *number = PyLong_FromLong(*(const int *)((const char *)results + (size_t)at * stride));
        if (number == NULL || PyList_SetItem(list, at, number) != 0)
            Py_CLEAR(list);
    }
    return list;
}

PyDoc_STRVAR(write_files_doc,
"write_files(directory, files)\n--\n\n"
"Writes files that have no name, reads each back, and sets its mode and the time of its last change.\n\n"
":param directory: the descriptor of one on the file system where they are to be.\n"
":param files: a list; for each its mode, its time in nanoseconds, and its contents.\n"
":returns: for each its descriptor, which the caller closes, or what went wrong: the number of an error with a minus,\n"
"    or ``DIFFERS`` where what is read back is not what was written.\n");

static PyObject *
write_files(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    int directory;
    PyObject *given, *found = NULL;
    void *records = NULL;
    struct written *files;
    char *back = NULL;
    Py_ssize_t count, ready = 0;
    size_t longest = 0;

    if (!PyArg_ParseTuple(arguments, "iO!:write_files", &directory, &PyList_Type, &given))
        return NULL;
    given = own_tuple(given, sizeof(*files), &records);
    if (given == NULL)
        return NULL;
    files = records;
    count = PyTuple_Size(given);
    for (; ready < count; ready++) {
        struct written *file = &files[ready];
        if (!PyArg_ParseTuple(PyTuple_GetItem(given, ready), "ILy*", &file->mode, &file->mtime_ns, &file->data))
            goto end;
        file->mode &= 0777;
        if ((size_t)file->data.len > longest)
            longest = (size_t)file->data.len;
    }
    back = PyMem_Malloc(longest + 1);
    if (back == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t at = 0; at < count; at++)
        files[at].result = write_one(directory, &files[at], back);
    Py_END_ALLOW_THREADS
    found = results_of(&files[0].result, sizeof(*files), count);
    for (Py_ssize_t at = 0; found == NULL && at < count; at++)
        if (files[at].result >= 0)
            close(files[at].result);
end:
    while (ready > 0)
        PyBuffer_Release(&files[--ready].data);
    PyMem_Free(back);
    PyMem_Free(records);
    Py_DECREF(given);
    return found;
}

struct named {
    const char *name;
    int fd;
    int directory;
    int result;
};

static int
name_one(const struct named *file)
{
    char path[32];

    snprintf(path, sizeof(path), "/proc/self/fd/%d", file->fd);
    if (linkat(AT_FDCWD, path, file->directory, file->name, AT_SYMLINK_FOLLOW) != 0)
        return errno;
    close(file->fd);
    return 0;
}

PyDoc_STRVAR(name_files_doc,
"name_files(files)\n--\n\n"
"Gives names to files that have none, where nothing has the name.\n\n"
":param files: a list; for each its descriptor, that of the directory, and its name there.\n"
":returns: for each 0, and it is closed; or the number of an error, as linkat(2) has them.\n");

static PyObject *
name_files(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *given, *found = NULL;
    void *records = NULL;
    struct named *files;
    Py_ssize_t count;

    if (!PyArg_ParseTuple(arguments, "O!:name_files", &PyList_Type, &given))
        return NULL;
    given = own_tuple(given, sizeof(*files), &records);
    if (given == NULL)
        return NULL;
    files = records;
    count = PyTuple_Size(given);
    for (Py_ssize_t at = 0; at < count; at++)
        if (!PyArg_ParseTuple(PyTuple_GetItem(given, at), "iiy", &files[at].fd, &files[at].directory, &files[at].name))
            goto end;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t at = 0; at < count; at++)
        files[at].result = name_one(&files[at]);
    Py_END_ALLOW_THREADS
    found = results_of(&files[0].result, sizeof(*files), count);
end:
    PyMem_Free(records);
    Py_DECREF(given);
    return found;
}

struct found {
    const char *name;
    int directory;
    /* Where its contents are, how many bytes they are, or that it cannot be had: -1. */
    size_t at;
    ssize_t length;
    struct stat status;
};

/* Opens a regular file as it is at one moment.  To open a device may do something already: that is looked at before. */
static int
open_regular(int directory, const char *name, struct stat *status)
{
    int fd;

    if (fstatat(directory, name, status, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(status->st_mode))
        return -1;
    fd = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd >= 0 && (fstat(fd, status) != 0 || !S_ISREG(status->st_mode))) {
        close(fd);
        return -1;
    }
    return fd;
}

static int
is_same_time(struct timespec one, struct timespec other)
{
    return one.tv_sec == other.tv_sec && one.tv_nsec == other.tv_nsec;
}

/* Reads one file behind what was read before; `room` grows.  -1 where it cannot be had, or changes meanwhile. */
static ssize_t
read_one(struct found *file, size_t most, char **room, size_t *size, size_t used)
{
    struct stat after;
    size_t length;
    ssize_t got = -1;
    int fd = open_regular(file->directory, file->name, &file->status);

    if (fd < 0)
        return -1;
    if (file->status.st_size >= 0 && (uintmax_t)file->status.st_size <= most) {
        length = (size_t)file->status.st_size;
        if (*size - used < length + 1) {
            /* Not Python's: its allocator takes the lock. */
            char *larger = realloc(*room, 2 * *size + length + 1);
            if (larger != NULL) {
                *size = 2 * *size + length + 1;
                *room = larger;
            }
        }
        if (*size - used >= length + 1) {
            got = read_all(fd, *room + used, length + 1);
            if (fstat(fd, &after) != 0 || (size_t)got != length || after.st_size != file->status.st_size ||
                !is_same_time(after.st_mtim, file->status.st_mtim) || !is_same_time(after.st_ctim, file->status.st_ctim))
                got = -1;
        }
    }
    close(fd);
    return got;
}

PyDoc_STRVAR(read_files_doc,
"read_files(files, most)\n--\n\n"
"Reads regular files, each as it was at one moment.\n\n"
":param files: a list; for each the descriptor of its directory, and its name there.\n"
":param most: bytes that one may have.\n"
":returns: for each the time of its last change in seconds, and the nanoseconds of that, its mode, and its contents; or\n"
"    ``None`` where it cannot be had, has more bytes, or changed meanwhile.\n");

static PyObject *
found_of(const struct found *file, const char *room)
{
    if (file->length < 0)
        return Py_NewRef(Py_None);
    return Py_BuildValue("LlIy#", (long long)file->status.st_mtim.tv_sec, (long)file->status.st_mtim.tv_nsec,
                         (unsigned int)file->status.st_mode & 0777, room + file->at, (Py_ssize_t)file->length);
}

static PyObject *
read_files(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *given, *list = NULL;
    void *records = NULL;
    struct found *files;
    char *room = NULL;
    size_t size = 0, used = 0;
    Py_ssize_t count, most;

    if (!PyArg_ParseTuple(arguments, "O!n:read_files", &PyList_Type, &given, &most))
        return NULL;
    if (most < 0) {
        PyErr_SetString(PyExc_ValueError, "no file has less than 0 bytes");
        return NULL;
    }
    given = own_tuple(given, sizeof(*files), &records);
    if (given == NULL)
        return NULL;
    files = records;
    count = PyTuple_Size(given);
    for (Py_ssize_t at = 0; at < count; at++)
        if (!PyArg_ParseTuple(PyTuple_GetItem(given, at), "iy", &files[at].directory, &files[at].name))
            goto end;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t at = 0; at < count; at++) {
        files[at].at = used;
        files[at].length = read_one(&files[at], (size_t)most, &room, &size, used);
        if (files[at].length > 0)
            used += (size_t)files[at].length;
    }
    Py_END_ALLOW_THREADS
    list = PyList_New(count);
    for (Py_ssize_t at = 0; list != NULL && at < count; at++) {
        PyObject *one = found_of(&files[at], room);
        if (one == NULL || PyList_SetItem(list, at, one) != 0)
            Py_CLEAR(list);
    }
end:
    free(room);
    PyMem_Free(records);
    Py_DECREF(given);
    return list;
}

static int
add_constants(PyObject *module)
{
    return PyModule_AddIntConstant(module, "DIFFERS", DIFFERS);
}

static PyMethodDef methods[] = {
    {"write_files", write_files, METH_VARARGS, write_files_doc},
    {"name_files", name_files, METH_VARARGS, name_files_doc},
    {"read_files", read_files, METH_VARARGS, read_files_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef_Slot slots[] = {
    {Py_mod_exec, add_constants},
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "protoframe.files._native",
    .m_doc = "Many small files in one call, without the interpreter's lock.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
