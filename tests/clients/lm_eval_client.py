"""lm-eval against a server: python lm_eval_client.py BASE_URL MODEL TOKENIZER_FOLDER. A made-up task of each kind, scored by texts and by
generation, once with prompts as token ids and once as text; exits with an error if the two do not agree."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval

DOCUMENTS = [
    {"question": "The grass is", "choices": [" green.", " yellow."], "answer": 0},
    {"question": "The sky is", "choices": [" green.", " blue."], "answer": 1},
    {"question": "Äpfel, naïve", "choices": [" café", " 東京"], "answer": 0},
]


def main(base_url: str, name: str, tokenizer: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "documents.json")
        data.write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
        shared = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "metadata": {"version": 1},
        }
        choice = {
            **shared, "task": "made_up_choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
            "target_delimiter": "",
        }
        written = {
            **shared, "task": "made_up_text", "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        }

        def run(model: str, path: str, tasks: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
            arguments = {"model": name, "base_url": f"{base_url}/{path}", "num_concurrent": 1, "max_retries": 1, "max_length": 1024, **more}
            chat = {"apply_chat_template": True} if path.startswith("chat") else {}
            return lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=tasks, log_samples=True, bootstrap_iters=0, **chat)

        by_ids, by_text = (
            run("local-completions", "completions", [choice, written], tokenizer=tokenizer, tokenizer_backend="huggingface", tokenized_requests=ids)
            for ids in (True, False)
        )
        for found in (by_ids, by_text):
            assert 0 <= found["results"]["made_up_choice"]["acc,none"] <= 1
            assert len(found["samples"]["made_up_text"]) == len(DOCUMENTS)
        scores = [
            [float(score) for sample in found["samples"]["made_up_choice"] for (score, _) in sample["filtered_resps"]] for found in (by_ids, by_text)
        ]
        assert len(scores[0]) == 6 and all(score < 0 for score in scores[0])
        assert all(abs(first - second) < 0.1 for first, second in zip(*scores, strict=True)), scores
        chat = run("local-chat-completions", "chat/completions", [written])
        assert len(chat["samples"]["made_up_text"]) == len(DOCUMENTS)


if __name__ == "__main__":
    main(*sys.argv[1:4])
    print("ok")
