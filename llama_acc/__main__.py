"""`llama-acc`, and `python -m llama_acc`."""

import gc


def main() -> None:
    """Runs the command line, which takes a while to import: signals are handled first."""
    from llama_acc.cli import stopping

    stopping.watch()
    # Importing torch makes many objects and little garbage: to look for it after every 700 takes a tenth of the time.
    gc.set_threshold(20_000)
    from llama_acc.cli.app import main as command_line

    try:
        command_line()
    finally:
        gc.freeze()  # the process ends: to look for garbage among torch's objects once more takes 0.4 s


if __name__ == "__main__":
    main()
