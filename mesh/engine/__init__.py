"""The engine room: the pinned, patched llama.cpp. Built once, found by content, run with command lines made here."""
