"""The moments at which a run touches its files: before, amid and after each write, and around each
sync, rename, truncation and removal. Used to take a run apart (test_resume.py) and to kill it there
(kill_loop.py); the program itself has no hook."""

import os
from pathlib import Path

import ptdpo


class Traced:
    """A file opened for writing, that reports when it is written to."""

    def __init__(self, file, name, moment):
        self.file, self.name, self.moment = file, name, moment

    def write(self, data):
        """In two halves, the first of which is flushed: a torn write."""
        self.moment(f"before write {self.name}")
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.moment(f"amid write {self.name}")
        self.file.write(data[half:])
        self.moment(f"after write {self.name}, not flushed")

    def flush(self):
        """The rest reaches the operating system."""
        self.file.flush()
        self.moment(f"after flush {self.name}")

    def fileno(self):
        """For os.fsync."""
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def trace(monkeypatch, moment):
    """From now on moment(label) is called at each of them."""

    def around(owner, name, label):
        plain = getattr(owner, name)

        def traced(*args, **more):
            what = f"{label} {Path(args[0]).name}" if isinstance(args[0], (str, Path)) else label
            moment(f"before {what}")
            result = plain(*args, **more)
            moment(f"after {what}")
            return result

        monkeypatch.setattr(owner, name, traced)

    def traced_open(path, mode="r", *more):
        file = open(path, mode, *more)  # noqa: SIM115
        if not set(mode) & set("wax"):
            return file
        moment(f"after open {path.name}")
        return Traced(file, path.name, moment)

    monkeypatch.setattr(ptdpo, "open", traced_open, raising=False)
    around(Path, "write_bytes", "write")
    around(Path, "unlink", "remove")
    for name, label in (("fsync", "sync"), ("replace", "rename"), ("truncate", "truncate")):
        around(os, name, label)
