"""Answer files with times that are easy to reckon with."""

import json


def write(path, speeds, *, model_id="Tiny-fp16-baseline", accept=1, first=1, texts=None, categories=("math",)):
    """One turn of 120 tokens a question at so many tokens a second; text i is question i's, else all say the same."""
    with path.open("a") as file:
        for i, speed in enumerate(speeds):
            text = texts[i] if texts else "same"
            choice = {"index": 0, "turns": [text], "token_ids": [list(text.encode())], "new_tokens": [120],
                      "wall_time": [120 / speed], "accept_lengths": [accept] * (120 // accept), "prompt_tokens": [7],
                      "prefill_time": [0.1]}
            file.write(json.dumps({"question_id": first + i, "category": categories[i % len(categories)], "answer_id": "a",
                                   "model_id": model_id, "choices": [choice]}) + "\n")
    return path
