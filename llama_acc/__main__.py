"""`python -m llama_acc` is the `llama-acc` command."""

from llama_acc.cli.app import main

if __name__ == "__main__":
    main()
