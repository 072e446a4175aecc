"""A local page and an API to try runs in; only this package needs FastAPI and uvicorn."""
