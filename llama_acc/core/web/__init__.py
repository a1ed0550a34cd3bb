"""Pages for a browser, made with Gradio; each is an application that asks no other host for anything."""
