"""Paths that are no files: opening some of them would wait for ever."""

import os
import socket


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.fspath(path))


def make_link_to_device(path):
    os.symlink("/dev/zero", path)


SPECIAL_FILES = {
    "a named pipe (fifo), not a file": make_fifo,
    "a socket, not a file": make_socket,
    "a device, not a file": make_link_to_device,
}
