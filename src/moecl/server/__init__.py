"""A store as a service: OpenAI's API and a page over one engine, for all tasks of one base in one process.

settings   what `moecl serve` was asked for
schema     requests and answers, as pydantic models
problems   what goes wrong, as OpenAI's error objects
library    the store's model as it is now; read again when it changes
queue      the one thread that runs the model, for rows of all requests together
service    from a request's rows to answers
spoken     answers as OpenAI's objects, whole and as a stream
guard      what every request passes: size, host, key, log, figures
auth       keys
memory     what keeps the process from growing
metrics    figures for Prometheus
app        routes
serve      the process: from a run folder to its end
"""
