"""Ask a server of `moecl serve RUN` with OpenAI's official client (pip install openai).

    python examples/openai_client.py http://127.0.0.1:8000 "The crowd went home happy."

Each task is a model: one that classifies answers with a label, one that writes answers with a text, as it is written.
A key, where the server wants one, is read from OPENAI_API_KEY.
"""

import os
import sys

import openai


def main(address: str, text: str) -> None:
    client = openai.OpenAI(base_url=f"{address.rstrip('/')}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    for model in client.models.list():
        print(f"{model.id}: ", end="", flush=True)
        messages = [{"role": "user", "content": text}]
        try:
            pieces = client.chat.completions.create(model=model.id, messages=messages, max_tokens=32, stream=True)
            for piece in pieces:
                print(piece.choices[0].delta.content or "", end="", flush=True)
            print()
        except openai.APIError as error:
            print(f"({error.message})")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], sys.argv[2])
    except openai.APIError as error:
        sys.exit(f"{sys.argv[1]}: {error}")
