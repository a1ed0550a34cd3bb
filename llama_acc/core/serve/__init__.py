"""A model as a service over HTTP, in the protocol of OpenAI's API (the extra `serve`)."""
