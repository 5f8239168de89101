"""Step 3: a language model that answers, and calls the tools."""

from os import environ

from step2_tools import TOOLS

from tricorn.chat.agents.model import OPENAI, Model

agent = Model(
    environ.get("MODEL", "gpt-4.1-mini"),
    base_url=environ.get("MODEL_URL", OPENAI),
    api_key=environ.get("OPENAI_API_KEY", ""),
    system="You sell tea and coffee. Use your tools; do not guess.",
    tools=TOOLS,
)
