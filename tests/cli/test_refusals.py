"""What is typed and cannot be meant is refused before anything is read for long: what, where, and what to type next.

Everything here ends with 2, says so on standard error alone, and leaves no run behind.
"""

import json
import shlex
from pathlib import Path

import pytest

from tests.cli.commands import QUICKSTART, invoke, refused
from tests.core.data.pictures import encoded, plain
from tests.core.evaluate.apibench import TORCH_HUB, write_database, write_evaluation, write_responses

LONG = "n" * 256  # bytes in a file's name; file systems take 255
QUICK = "finetune --recipe quickstart --output run"
TRAIN = shlex.join(QUICKSTART)
DRY_RUN = f"{TRAIN} --dry-run"
OUTSIDE = ("../elsewhere", "/tmp/elsewhere", "..", "'\"\"'")
ASK = "chat --ckpt RUN --prompt hi"
CAPTION = "caption --ckpt SEER a.png"
MEMORY = "benchmark-vram --model llama2-7b"
GORILLA = "evaluate gorilla --hub torchhub --api api.jsonl --questions eval.json"
PERPLEXITY = "evaluate perplexity --ckpt RUN"
CONVERT = "convert-checkpoint TALKER new"

FLAGS = [
    ("finetun", "No such command 'finetun'", "finetune"),
    ("recipes lst", "No such command 'lst'", "list"),
    ("finetune --pretraind x", "--pretrained"),
    ("chat", "Missing option '--ckpt'"),
    ("chat --ckpt x --temperature hot", "Invalid value for '--temperature'"),
    ("chat --ckpt x --max-new-tokens 1.5", "Invalid value for '--max-new-tokens'"),
    ("chat --ckpt x --device gpu", "'gpu' is not one of: cuda, cuda:1 (another GPU), mps, cpu."),
    ("finetune --device meta", "'meta' is not one of: cuda, cuda:1 (another GPU), mps, cpu."),
    ("recipes copy lima", "Missing argument 'file'"),
    ("finetune --data ''", "Invalid value for '--data': it is empty. Is a shell variable not set?"),
    ("finetune --pretrained x --pretrained ''", "Invalid value for '--pretrained': it is empty."),
    ("chat --ckpt ''", "Invalid value for '--ckpt': it is empty."),
    ("convert-data alpaca ''", "it is empty"),
    ("download lima --token ''", "it is empty"),
    ("convert-data alpaca file --preview " + "9" * 20, "'--preview': 99999999999999999999 is beyond"),
    ("benchmark-vram --gpus " + "9" * 20, "Invalid value for '--gpus'"),
]
NAMES = [
    (f"finetune --recipe {LONG}", "give a shorter one"),
    (f"{DRY_RUN} --data {LONG}", "give a shorter one"),
    (f"{DRY_RUN} --output {LONG}", "give a shorter one"),
    (f"chat --ckpt {LONG} --prompt x", "give a shorter one"),
    (f"{DRY_RUN} --output file/run", "Not a directory"),
    (f"{DRY_RUN} model.params={LONG}", "File name too long"),
    ("convert-data check file/a.json", "there is no data 'file/a.json'"),
    ("chat --ckpt deep --prompt x", "nested more than 100 deep"),
]
RECIPES = [
    ("finetune", "which recipe? --recipe is missing", "begin with --recipe quickstart"),
    ("recipes show alpacca", "unknown recipe 'alpacca': did you mean 'alpaca' or 'alpaca-lora'?"),
    ("recipes copy alpacca x", "unknown recipe 'alpacca': did you mean 'alpaca' or 'alpaca-lora'?"),
    ("recipes show zzz", "unknown recipe 'zzz' hint: `llama-acc recipes` lists them all"),
    (f"{QUICK} train.epohs=3 train.precision=fp16", "unknown key 'train.epohs': did you mean", "not 'fp16'"),
    ("finetune --recipe my/lima.yaml", "recipe file my/lima.yaml does not exist", "llama-acc recipes"),
    ("finetune --recipe deep.yaml", "cannot read deep.yaml: lists or mappings are nested more than 100 deep"),
    (f"{DRY_RUN} train.epochs=1e300", "train.epochs: should be less than or equal to 1000000, not 1e+300"),
    (f"{DRY_RUN} train.max_steps={'9' * 30}", "train.max_steps: should be less than or equal to 1000000000"),
    (f"{DRY_RUN} train.seed={'9' * 5000}", "cannot read the value: "),
    (f"{DRY_RUN} train.seed={'[' * 1200}", "cannot read the value: "),
    (f"{QUICK} data.sources.0.template=alpacca", "did you mean 'alpaca'?"),
    (f"{QUICK} --data nowhere.json", "there is no data 'nowhere.json'"),
    (f"{DRY_RUN} --data lines.jsonl", "lines.jsonl: item 2 (line 2), column 1: not JSON"),
    (f"{DRY_RUN} --data deep.yaml", "nested more than 100 deep"),
    (f"{DRY_RUN} --data images.json", "images.json", "this model has no vision encoder"),
    *((f"{TRAIN} name={name}", "is no name for a folder", "give --output DIR") for name in OUTSIDE),
    (f"{DRY_RUN} --resume", "--dry-run and --resume cannot be combined"),
]
PROCESSES = [
    (f"{QUICK} --nproc 3 parallel.model_parallel_size=2", "parallel.model_parallel_size is 2, which does not divide"),
    (f"{QUICK} --nproc 8 parallel.model_parallel_size=8", "n_heads (4)"),
    (f"{QUICK} --nnodes 2", "--nnodes above 1 and --rdzv-endpoint go together"),
    (f"{QUICK} --rdzv-endpoint here:1", "--nnodes above 1 and --rdzv-endpoint go together"),
    (f"{QUICK} --nproc 2 --device cuda:1", "--device cuda:1 is one GPU"),
    (f"{QUICK} --nproc none", "'none' is neither a number of processes nor auto"),
    (f"{QUICK} --nproc 0", "'0' is neither a number of processes nor auto"),
    (f"{QUICK} --nnodes 2 --rdzv-endpoint here", "'here' is not HOST:PORT"),
    (f"{QUICK} --nproc 2 --nnodes 2 --rdzv-endpoint no.such.host.invalid:1", "--rdzv-endpoint no.such.host"),
    (f"{ASK} --nproc 3", "model-parallel size", "3"),
]
NOT_HERE = [
    ("finetune --recipe lima --output run", "type: llama-acc download llama2-7b", "the folder that holds consolidated"),
    (f"{QUICK} --data ./inn.jsonl", "there is no data './inn.jsonl'", "did you mean 'in.jsonl'"),
    (f"{QUICK} --tokenizer no.model", "cannot read no.model: No such file"),
    (f"{QUICK} --pretrained TALKER --tokenizer TOKENIZER", "tokenizer and model do not fit: ", "--tokenizer FILE"),
    ("chat --ckpt TALKER --prompt hi --verify", "has no manifest.json", "--verify"),
    ("chat --ckpt llama2-7b", "type: llama-acc download llama2-7b"),
    ("chat --ckpt lama2-7b", "did you mean 'llama2-7b'"),
    ("chat --ckpt meta-llama/Llama-2-7b", "type: llama-acc download llama2-7b, and give that name"),
    (f"{QUICK} --data lima", "type: llama-acc download lima"),
    (f"{QUICK} --data limma", "did you mean 'lima'"),
]
CHAT_AND_CAPTION = [
    (f"{ASK} --temperature -1", "the temperature must be 0 or above, not -1.0", "0 is greedy"),
    (f"{ASK} --temperature nan", "the temperature must be 0 or above, not nan"),
    (f"{ASK} --top-p 0", "top-p must be above 0 and at most 1, not 0.0"),
    (f"{ASK} --top-p 1.1", "top-p must be above 0 and at most 1, not 1.1"),
    (f"{ASK} --max-new-tokens 0", "at least 1 new token must be allowed, not 0"),
    (f"{ASK} --seed {2**70}", "the seed must fit in 64 bits"),
    (f"{ASK} --template dialog", "unknown template 'dialog'", "did you mean 'dialogue'?"),
    (f"{ASK} --prompt '{'long ' * 1000}'", "the model's context is 256", "--context N"),
    (f"{ASK} --prompt '{'long ' * 1000}' --context 300", "the model's context is 300"),
    (f"{ASK} --prompt \udcff", "the text is not valid Unicode at character 1"),
    (f"{ASK} --tokenizer no.model", "cannot read no.model: No such file"),
    ("chat --ckpt TALKER --prompt x --image a.png", "this model takes no images"),
    ("chat --ckpt SEER --image a.png", "--image goes with --prompt"),
    (f"{CAPTION} --prompt a --instruction b", "do not go together"),
    (f"{CAPTION} --instruction What?", "takes no instruction: the model was trained to caption", "leave --instruction"),
    ("caption --ckpt TALKER a.png", "this model takes no images"),
    (f"{CAPTION} --prompt {'x' * 600}", "the model's context is 512"),
    ("caption --ckpt SEER -", "standard input names no image"),
    (f"{CAPTION} --html no/a.html", "there is no folder", "mkdir"),
]
BENCHMARK = [
    ("benchmark-vram", "which model?", "llama2-7b"),
    ("benchmark-vram --model llama2-7", "there is no model 'llama2-7'", "llama2-7b"),
    (f"{MEMORY} --max-tokens 5000", "5000 tokens are more", "model.max_seq_len=5000"),
    (f"{MEMORY} --gpus 3 --model-parallel-size 2", "does not divide"),
    (f"{MEMORY} --quantize nf4", "method full trains all"),
    (f"{MEMORY} --fit much", "--fit much is no size", "24GB"),
    (f"{MEMORY} --sweep tokens=1", "max_tokens, batch_size, gpus"),
    (f"{MEMORY} --fit 1GB --measure", "--fit and --measure cannot be combined"),
    (f"{MEMORY} --plot memory.jpg", "memory.jpg is no PNG: name it like memory.png"),
    (f"{MEMORY} --plot nowhere/a.png", "there is no folder nowhere"),
    (f"{MEMORY} --data-json none.json", "none.json is not the data.json of a run"),
    (f"{MEMORY} --kind a100", "unknown kind of GPU 'a100'", "a100-80gb"),
]
EVALUATE = [
    (GORILLA, "there is nothing to score"),
    (f"{GORILLA} --ckpt x --responses y", "give both --ckpt and --responses"),
    (f"{GORILLA} --responses x --output y --batch-size 16", "--output, --batch-size only matter"),
    (f"{GORILLA} --ckpt nowhere", "there is no checkpoint folder nowhere"),
    (f"{GORILLA} --ckpt nowhere --output no/such/folder.jsonl", "there is no folder no/such"),
    (f"{GORILLA} --ckpt x --batch-size 0", "--batch-size"),
    (f"{GORILLA} --responses nowhere.jsonl", "there is no data file nowhere.jsonl"),
    (f"{GORILLA} --responses x --hub huggingfase", "huggingfase"),
    (f"{GORILLA} --responses wrong.jsonl", "wrong.jsonl line 2: the evaluation file has no line 4"),
    (f"{GORILLA} --responses x --questions list.json", "list.json line 1: it should hold an object"),
    (f"{PERPLEXITY} --data DIALOGUES", "these are dialogues"),
    (f"{PERPLEXITY} --data nowhere.json", "there is no data 'nowhere.json'"),
    (f"{PERPLEXITY} --data DATA --max-tokens 5000", "more than the model's context (256)"),
    (f"{PERPLEXITY} --data DATA --max-tokens 3", "within 3 tokens"),
    (PERPLEXITY, "Missing option '--data'"),
]
DATA = [
    ("convert-data check DATA --max-tokens 9", "it needs --tokenizer"),
    ("convert-data check DATA --template alpcaa", "did you mean 'alpaca'?"),
    ("convert-data check DATA --format dialoge", "did you mean 'dialogue'?"),
    ("convert-data check DATA --tokenizer nowhere", "cannot read nowhere: No such file"),
    ("convert-data check nope", "name a file, a folder, a glob or a download"),
    ("convert-data check", "Missing argument"),
    ("convert-data gorila a", "No such command 'gorila'", "gorilla"),
    ("convert-data alpaca nowhere.json", "there is no data file nowhere.json"),
    ("convert-data lima", "lima is not downloaded", "llama-acc download lima"),
    ("convert-data gorilla gorilla-torchhub", "gorilla-torchhub is not downloaded", "llama-acc download gorilla-torch"),
    ("convert-data llava", "no data in the format llava", "llama-acc download llava-instruct-150k"),
    ("convert-data openai", "there is nothing to convert", "- for standard input"),
    ("convert-data lima - -", "standard input (-) can be read only once"),
    ("convert-data alpaca in.jsonl --output a.txt", ".txt is not a kind of file that is written", ".jsonl or .json"),
    ("convert-data alpaca in.jsonl --output in.jsonl", "is read from"),
    ("convert-data alpaca in.jsonl --output .", "no suffix is not a kind of file"),
    ("convert-data sharegpt in.jsonl --max-tokens 9", "--tokenizer and --max-tokens go together"),
    ("convert-data sharegpt in.jsonl --language english", "'english' is not an ISO 639-1 code"),
    ("convert-data sharegpt in.jsonl --language xx", "'xx' is no language that is recognized", "en, eo, es,"),
    ("convert-data llava in.jsonl --dialogues --reference", "do not go together"),
    ("convert-data alpaca in.jsonl --map output=b", "No such option", "--map"),
    ("convert-data jsonl in.jsonl --map q", "'q' is not FIELD=COLUMN"),
    ("convert-data jsonl in.jsonl --map ouput=q", "unknown field 'ouput'", "did you mean 'output'"),
    ("convert-data jsonl in.jsonl --map input=q --map input=r", "input is given twice"),
    ("convert-data jsonl in.jsonl --map output=b", "no 'b' (its keys: 'instruction', 'output', 'extra')"),
    ("convert-data jsonl faq.jsonl", "say which is which: --map instruction=question --map output=answer"),
]
DOWNLOADS = [
    ("download", "download what? Give a name or an address"),
    ("download lma", "the catalogue has no 'lma': did you mean 'lima'?"),
    ("download lma alpaka", "2 names are not known"),
    ("download lima --list", "--list shows the whole catalogue: leave the names out"),
    ("download hf:lima", "'hf:lima' is not an address on Hugging Face"),
    ("download ftp://example.org/a", "is not an address that can be fetched"),
    ("download meta-llama/Llama-2-7b", "of Hugging Face, type: llama-acc download hf:meta-llama/Llama-2-7b"),
    ("download file:///etc/passwd", "is not an address that can be fetched"),
    ("download 'hf:owner/name with space'", "is not an address on Hugging Face"),
    ("download hf:owner/name/../../secret", "leads out of its repository"),
    ("download https://", "names no host"),
    ("download https://example.org/", "names no file"),
    (f"download https://example.org/{LONG}", "longer than"),
    (f"download hf:owner/name/{LONG}", "longer than"),
    ("download lima --token 'two words'", "the token holds white space"),
    ("download http://[::1/a", "is not an address: Invalid IPv6 URL"),
    ("download http://a:99999999/a", "is not an address: Port out of range"),
    (f"download http://{LONG}/a", "is not an address: "),
    ("download 'http://a b/c'", "names no host"),
    (f"download hf:a/{LONG[:100]}", "cannot be a repository's name"),
]
CHECKPOINTS = [
    (CONVERT, "Missing option '--to'"),
    (f"{CONVERT} --to onnx", "Invalid value for '--to': ", "'onnx' is not one of 'meta', "),
    (f"{CONVERT} --to meta --dtype int8", "Invalid value for '--dtype'"),
    (f"{CONVERT} --to meta --model-parallel-size 3", "size 3 is not one of 1, 2, 4, 8"),
    (f"{CONVERT} --to meta --model-parallel-size 8", "n_heads (2) is not divisible by the model-parallel size (8)"),
    (f"{CONVERT} --to hf --model-parallel-size 2", "--model-parallel-size does not go with --to hf"),
    (f"{CONVERT} --to consolidated --diff", "--diff needs --base DIR"),
    (f"{CONVERT} --to hf --diff --base x", "--diff does not go with --to hf", "leave it out, or use --to consolidated"),
    (f"{CONVERT} --to consolidated --merge --diff --base x", "--merge and --diff do not go together"),
    (f"{CONVERT} --to consolidated --merge --quantize nf4", "--quantize and --merge do not", "with --merge first"),
    (f"{CONVERT} --to meta --quantize nf4", "--quantize does not go with --to meta", "or use --to consolidated"),
    (f"{CONVERT} --to peft --merge", "--merge does not go with --to peft", "leave it out, or use --to meta or"),
    (f"{CONVERT} --to peft", "method full has no LoRA pairs"),
    (f"{CONVERT} --to meta --merge", "has nothing to merge"),
    ("convert-checkpoint TALKER TALKER --to meta", "is what is to be converted"),
    ("convert-checkpoint TALKER RUN --to meta", "is not empty"),
    ("convert-checkpoint TALKER file --to meta", "file is a file"),
    ("convert-checkpoint . new --to meta", "holds no LLaMA checkpoint", "did you mean deep?"),
    (f"{CONVERT} --to peft --context 64", "--context does not go with --to peft"),
    ("convert-checkpoint nowhere new --to meta", "no checkpoint folder"),
]
SERVE = [
    ("serve --ckpt RUN --host 0.0.0.0", "set a key"),
    ("serve --ckpt RUN --api-key 'a b'", "without spaces"),
    ("serve --ckpt RUN --ckpt a=x --ckpt a=y", "is there twice"),
    ("serve --ckpt RUN --ckpt run=x", "the name run is that of"),
    ("serve --ckpt a=x --ckpt b=y", "add --ckpt BASE in front"),
    ("serve --ckpt a=", "should be NAME=DIR"),
]
CASES = [*FLAGS, *NAMES, *RECIPES, *PROCESSES, *NOT_HERE, *CHAT_AND_CAPTION, *BENCHMARK, *EVALUATE]
CASES += [*DATA, *DOWNLOADS, *CHECKPOINTS, *SERVE]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name."""
    folder = tmp_path_factory.mktemp("place")
    nested = "[" * 1200 + "]" * 1200
    (folder / "file").write_text("x")
    (folder / "deep.yaml").write_text(f"name: {nested}")
    (folder / "deep").mkdir()
    (folder / "deep" / "params.json").write_text(nested)
    (folder / "deep" / "consolidated.00.pth").write_text("")
    (folder / "in.jsonl").write_text(json.dumps({"instruction": "name a town", "output": "a town", "extra": 1}))
    (folder / "lines.jsonl").write_text('{"instruction": "a", "output": "b"}\nx\n')
    (folder / "images.json").write_text('[{"image": "a.png", "instruction": "a", "output": "b"}]')
    (folder / "faq.jsonl").write_text(json.dumps({"question": "Why?", "answer": "So."}))
    (folder / "a.png").write_bytes(encoded(plain(0)))
    write_database(folder / "api.jsonl", TORCH_HUB)
    write_evaluation(folder / "eval.json", [("which town:", "Towns"), ("which bird?", "Birds"), ("which?", "Roads")])
    write_responses(folder / "wrong.jsonl", [(1, "x"), (4, "x")])
    (folder / "list.json").write_text("[1]\n")
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0][:70].encode("ascii", "replace").decode())
def test_what_cannot_be_meant_is_refused(
    case: tuple[str, ...],
    place: Path,
    trained_once: Path,
    talker: Path,
    seer: Path,
    single_turn: Path,
    dialogues: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    places = {"RUN": trained_once, "TALKER": talker, "SEER": seer, "DATA": single_turn, "DIALOGUES": dialogues}
    places["TOKENIZER"] = trained_once / "epoch0" / "tokenizer.model"
    line, *said = case
    before = sorted(path.name for path in place.iterdir())
    result = invoke(*(places.get(word, word) for word in shlex.split(line)))
    refused(result, *said)
    assert result.stderr.count("did you mean") <= 1 + ("names" in said[0])
    assert sorted(path.name for path in place.iterdir()) == before
