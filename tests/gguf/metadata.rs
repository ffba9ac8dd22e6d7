//! Typed access to metadata.

use nepenthe::gguf::{Array, GgufError, Metadata, RawString, Value};

fn sample() -> Metadata {
    let mut meta = Metadata::new();
    meta.set("n", 7u32);
    meta.set("neg", -3i8);
    meta.set("big", u64::MAX);
    meta.set("x", 0.1f64);
    meta.set("half", 0.5f64);
    meta.set("flag", true);
    meta.set("name", "llama");
    meta.set("raw", RawString(vec![0xff]));
    meta.set("ids", vec![1i32, 2, 3]);
    meta.set("tokens", vec!["a", "b"]);
    meta
}

#[test]
fn integers_convert_when_lossless() {
    let meta = sample();
    assert_eq!(meta.get::<u8>("n").unwrap(), 7);
    assert_eq!(meta.get::<i64>("n").unwrap(), 7);
    assert_eq!(meta.get::<i32>("neg").unwrap(), -3);
    assert_eq!(meta.get::<u64>("big").unwrap(), u64::MAX);
    assert!(meta.get::<u32>("neg").is_err());
    assert!(meta.get::<i64>("big").is_err());
    assert!(meta.get::<u32>("half").is_err() && meta.get::<f32>("n").is_err());
    assert_eq!(meta.get::<Vec<u16>>("ids").unwrap(), [1, 2, 3]);
    assert_eq!(meta.get::<&[i32]>("ids").unwrap(), [1, 2, 3]);
    assert!(meta.get::<&[u32]>("ids").is_err());
}

#[test]
fn floats_convert_when_lossless() {
    let meta = sample();
    assert_eq!(meta.get::<f32>("half").unwrap(), 0.5);
    assert_eq!(meta.get::<f64>("x").unwrap(), 0.1);
    assert!(meta.get::<f32>("x").is_err());
}

#[test]
fn strings_are_text_only_when_utf8() {
    let meta = sample();
    assert_eq!(meta.get::<&str>("name").unwrap(), "llama");
    assert_eq!(meta.get::<Vec<&str>>("tokens").unwrap(), ["a", "b"]);
    assert_eq!(meta.get::<&RawString>("raw").unwrap().as_bytes(), [0xff]);
    let error = meta.get::<&str>("raw").unwrap_err().to_string();
    assert!(
        error.contains("`raw`: wanted a UTF-8 string, found a string that is not UTF-8"),
        "{error}"
    );
}

#[test]
fn errors_name_key_wanted_and_found() {
    let meta = sample();
    let message = |e: GgufError| e.to_string();
    assert_eq!(
        message(meta.get::<u8>("big").unwrap_err()),
        "<memory>: key `big`: wanted u8, found u64 18446744073709551615"
    );
    assert_eq!(
        message(meta.get::<bool>("ids").unwrap_err()),
        "<memory>: key `ids`: wanted bool, found an array of 3 i32"
    );
    assert_eq!(
        message(meta.get::<bool>("none").unwrap_err()),
        "<memory>: key `none`: wanted bool, found no such key"
    );
    assert_eq!(meta.get_opt::<bool>("none").unwrap(), None);
    assert!(meta.get_opt::<bool>("n").is_err());
}

#[test]
fn set_replaces_in_place_and_remove_keeps_order() {
    let mut meta = Metadata::new();
    for key in ["a", "b", "c"] {
        assert_eq!(meta.set(key, 1u8), None);
    }
    assert_eq!(meta.set("b", "new"), Some(Value::U8(1)));
    assert_eq!(meta.remove("a"), Some(Value::U8(1)));
    assert_eq!(meta.remove("a"), None);
    let keys: Vec<_> = meta.iter().map(|(k, _)| k).collect();
    assert_eq!(keys, ["b", "c"]);
    assert_eq!(meta.get::<&str>("b").unwrap(), "new");
}

#[test]
fn an_empty_array_keeps_its_type() {
    let mut meta = Metadata::new();
    meta.set("empty", Vec::<f32>::new());
    assert!(meta.get::<&Array>("empty").unwrap().is_empty());
    assert!(meta.get::<Vec<u32>>("empty").is_err());
    assert!(meta.get::<Vec<f64>>("empty").unwrap().is_empty());
}
