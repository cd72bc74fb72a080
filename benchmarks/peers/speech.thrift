service Speech {
    string upper(1: string text),
    i64 put(1: binary data),
}
