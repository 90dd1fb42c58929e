"""Vision-language models behind one small interface: conversations in, text or choices out."""
