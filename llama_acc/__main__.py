"""`llama-acc`, and `python -m llama_acc`."""


def main() -> None:
    """Runs the command line, which takes a while to import: signals are handled first."""
    from llama_acc.cli import stopping

    stopping.watch()
    from llama_acc.cli.app import main as command_line

    command_line()


if __name__ == "__main__":
    main()
