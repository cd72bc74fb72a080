"""The sans-I/O heart of protoframe: bytes and the time go in; bytes, events and the next timer come out.

Nothing below this package knows Twisted, sockets, clocks, random numbers or logs.  From the bottom up:

`limits`
    how much of everything an end takes.
`frames`
    the layout of each frame, read and written.
`stream`
    a byte stream cut into frames.
`deadlines`
    many deadlines behind one timer.
`state`, `events`
    where a conversation stands, and what it tells.
`messages`
    messages of several frames, sent in turns and put together.
`conversation`
    the request layer: calls, their outcomes, limits and the state of the conversation.
`schema`
    what a Protocol's annotations say: methods, and the codecs of their parameters, results and errors.
"""
