@0xb3c8f1d5a2e94766;

interface Speech {
    upper @0 (text :Text) -> (text :Text);
    put @1 (data :Data) -> (length :UInt64);
}
