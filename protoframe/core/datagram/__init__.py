"""Frames over datagrams: what makes a network that loses, doubles and reorders carry a conversation.

Like all of `protoframe.core` it knows no sockets, clock or random numbers: datagrams, the time and random octets go in;
datagrams, frames and the next timer come out.  ``docs/wire-format.md`` specifies what goes over the network.

=============  ========================================================================================
`packets`      the layout of every packet and of what is in it, read and written
`ranges`       sets of numbers that come mostly in order
`rtt`          how long a round trip takes
`congestion`   how much may be on the way: NewReno, and pacing
`recovery`     which packets are on the way, which are lost, and when to ask
`outflow`      which frames keep their order, and the segments that they travel in
`inflow`       segments put together again, each once
`mtu`          how large a packet a path takes
`gate`         who is let in: cookies and tokens
`association`  one end of what two ends share
=============  ========================================================================================
"""
