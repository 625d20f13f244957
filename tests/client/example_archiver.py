#!/usr/bin/env python3
"""An external archiver for casbackup that needs nothing but Python: it keeps archives as folders.

    casbackup export vm/100 --exec 'example_archiver.py store /archive/web'
    casbackup import vm/100 --exec 'example_archiver.py fetch /archive/web'

A folder has head.json as it came, and a sparse file for each disk: 0.disk, 1.disk, ...
The stream is described in docs/spec/archiver.md.
"""

import json
import os
import struct
import sys

MAGIC = b"casarch1"
FRAME = struct.Struct("<BxH4xQQ")
HEAD, DATA, ZEROS, END, ERROR = 1, 2, 3, 4, 5
PIECE = 1 << 20


def read(length):
    data = sys.stdin.buffer.read(length)
    if len(data) < length:
        sys.exit("the stream ends too early")
    return data


def store(folder):
    if read(len(MAGIC)) != MAGIC:
        sys.exit("this is not a stream of casbackup")
    os.makedirs(folder)
    disks = []
    while True:
        kind, disk, offset, length = FRAME.unpack(read(FRAME.size))
        if kind == HEAD:
            content = read(length)
            with open(os.path.join(folder, "head.json"), "wb") as file:
                file.write(content)
            for number, described in enumerate(json.loads(content)["disks"]):
                disks.append(open(os.path.join(folder, f"{number}.disk"), "wb"))  # noqa: SIM115
                disks[-1].truncate(described["size_bytes"])
        elif kind == DATA:
            disks[disk].seek(offset)
            disks[disk].write(read(length))
        elif kind == END:
            break
        elif kind == ERROR:
            sys.exit("casbackup failed: " + read(length).decode())
    for file in disks:
        file.close()


def fetch(folder):
    out = sys.stdout.buffer

    def frame(kind, disk=0, offset=0, length=0, content=b""):
        out.write(FRAME.pack(kind, disk, offset, length) + content)

    with open(os.path.join(folder, "head.json"), "rb") as file:
        head = file.read()
    out.write(MAGIC)
    frame(HEAD, length=len(head), content=head)
    for disk, described in enumerate(json.loads(head)["disks"]):
        size = described["size_bytes"]
        with open(os.path.join(folder, f"{disk}.disk"), "rb") as file:
            for offset in reversed(range(0, size, PIECE)):  # any order will do
                file.seek(offset)
                content = file.read(min(PIECE, size - offset))
                if content.count(0) == len(content):
                    frame(ZEROS, disk, offset, len(content))
                else:
                    frame(DATA, disk, offset, len(content), content)
    frame(END)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("store", "fetch"):
        sys.exit(__doc__)
    {"store": store, "fetch": fetch}[sys.argv[1]](sys.argv[2])
