"""``python -m adadfq`` is the ``adadfq`` command."""

from adadfq.cli import main

if __name__ == "__main__":
    main(prog_name="adadfq")
