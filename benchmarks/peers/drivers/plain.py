"""The script that everybody writes first: one request after another with the openai client, a line a row."""

import json

import openai
from common import MAX_TOKENS, MODEL, parse, report


def main() -> None:
    job = parse()
    client = openai.OpenAI(base_url=f"{job.url}/v1", api_key="none")
    path = job.out / "rows.jsonl"
    with path.open("a") as file:
        for prompt in job.texts():
            answer = client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": prompt}], max_tokens=MAX_TOKENS
            )
            file.write(json.dumps({"prompt": prompt, "text": answer.choices[0].message.content}) + "\n")
    with path.open() as file:
        report(job, [json.loads(line)["prompt"] for line in file])


if __name__ == "__main__":
    main()
