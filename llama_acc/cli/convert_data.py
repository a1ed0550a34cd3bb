"""`llama-acc convert-data`: from the form data is published in to the one `finetune` takes, and checks of that."""

import typer

HELP = """Check data files, and show items as a model will see them.

Examples:

  llama-acc convert-data check alpaca.json

  llama-acc convert-data check lima.json --tokenizer Llama-2-7b --max-tokens 4096 --preview 3
"""

app = typer.Typer(no_args_is_help=True)
