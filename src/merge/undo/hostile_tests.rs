//! One hostile file per field, each with its own error; none panics or allocates what it asks.

use super::*;
use crate::digest::Digest;
use flate2::write::ZlibEncoder;
use sha2::{Digest as _, Sha256};

/// The merged model of all tests: 100 bytes.
const MERGED: [u8; 100] = [7; 100];

/// An undo file, field by field; the sums are right unless a test says otherwise.
struct Fields {
    magic: Vec<u8>,
    version: u32,
    n_original: u32,
    n_merged: u32,
    text: Vec<u8>,
    text_len: Option<u32>,
    original: Vec<(u64, Vec<u8>)>,
    merged_len: u64,
    body: Vec<u8>,
    deflate: bool,
    body_len: Option<u64>,
    digest: Option<[u8; 32]>,
}

fn sha(bytes: &[u8]) -> Vec<u8> {
    Sha256::digest(bytes).to_vec()
}

/// Restores ten bytes from merged bytes 0..10.
fn good() -> Fields {
    Fields {
        magic: MAGIC.to_vec(),
        version: VERSION,
        n_original: 1,
        n_merged: 1,
        text: br#"{"original":"a","merged":"b","patches":["p"]}"#.to_vec(),
        text_len: None,
        original: vec![(10, sha(&MERGED[..10]))],
        merged_len: 100,
        body: vec![blocks::COPY, 0, 0, 10],
        deflate: true,
        body_len: None,
        digest: None,
    }
}

impl Fields {
    fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.clone();
        let text_len = self.text_len.unwrap_or(self.text.len() as u32);
        for n in [self.version, self.n_original, self.n_merged, text_len] {
            out.extend(n.to_le_bytes());
        }
        for (len, digest) in &self.original {
            out.extend(len.to_le_bytes());
            out.extend(digest);
        }
        out.extend(self.merged_len.to_le_bytes());
        out.extend(sha(&MERGED));
        out.extend(&self.text);
        let body = if self.deflate {
            let mut deflated = ZlibEncoder::new(Vec::new(), flate2::Compression::default());
            deflated.write_all(&self.body).expect("memory");
            deflated.finish().expect("memory")
        } else {
            self.body.clone()
        };
        out.extend(self.body_len.unwrap_or(body.len() as u64).to_le_bytes());
        out.extend(body);
        let own = Sha256::digest(&out);
        out.extend(self.digest.unwrap_or(own.into()));
        out
    }

    /// What opening and applying it gives.
    fn restore(&self) -> Result<Vec<u8>, UndoError> {
        restore(&self.bytes())
    }

    fn error(&self) -> UndoError {
        let error = self.restore().expect_err("the file is hostile");
        assert!(error.to_string().contains("hostile.undo"), "{error}");
        error
    }

    fn body_error(&self) -> BodyError {
        match self.error() {
            UndoError::Body { problem, .. } => problem,
            other => panic!("{other:?}"),
        }
    }
}

fn restore(bytes: &[u8]) -> Result<Vec<u8>, UndoError> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (path, merged) = (dir.path().join("hostile.undo"), dir.path().join("merged"));
    std::fs::write(&path, bytes).expect("room");
    std::fs::write(&merged, MERGED).expect("room");
    let undo = Undo::open(&path)?;
    let opened = undo.merged().iter().map(|_| open(&merged));
    let files: Vec<File> = opened.collect::<Result<_, _>>()?;
    let mut restore = undo.start(&files)?;
    let mut out = Vec::new();
    for _ in undo.original() {
        restore.write_part(&mut out)?;
    }
    restore.finish()?;
    Ok(out)
}

fn body(bytes: &[u8]) -> BodyError {
    Fields {
        body: bytes.to_vec(),
        ..good()
    }
    .body_error()
}

#[test]
fn the_good_file_is_good() {
    assert_eq!(good().restore().expect("good"), MERGED[..10]);
    // By difference, and spelled out.
    let mut wanted = MERGED[..10].to_vec();
    wanted[3] = 9;
    let mut fields = good();
    fields.original[0].1 = sha(&wanted);
    fields.body = vec![blocks::DIFF, 0, 50, 10, 1, 3, 1, 2];
    assert_eq!(fields.restore().expect("good"), wanted);
    fields.body = [&[blocks::SPELLED, 10], &wanted[..]].concat();
    assert_eq!(fields.restore().expect("good"), wanted);
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = good().bytes();
    for n in 0..bytes.len() {
        assert!(restore(&bytes[..n]).is_err(), "{n} bytes");
    }
}

#[test]
fn every_flipped_bit_is_an_error() {
    let bytes = good().bytes();
    for i in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[i / 8] ^= 1 << (i % 8);
        assert!(restore(&bad).is_err(), "bit {i}");
    }
}

#[test]
fn magic() {
    let fields = Fields {
        magic: b"GGUF\x03\0\0\0".to_vec(),
        ..good()
    };
    assert!(matches!(fields.error(), UndoError::Magic { .. }));
}

#[test]
fn version() {
    let fields = Fields {
        version: 2,
        ..good()
    };
    assert!(matches!(
        fields.error(),
        UndoError::Version { found: 2, .. }
    ));
    assert!(fields.error().is_mismatch());
}

#[test]
fn part_counts() {
    for n in [0, 65_536, u32::MAX] {
        let fields = Fields {
            n_original: n,
            ..good()
        };
        assert!(matches!(fields.error(), UndoError::Count { .. }), "{n}");
        let fields = Fields {
            n_merged: n,
            ..good()
        };
        assert!(matches!(fields.error(), UndoError::Count { .. }), "{n}");
    }
    // Within the limit, but not in the file.
    let fields = Fields {
        n_original: 65_535,
        ..good()
    };
    assert!(fields.restore().is_err());
}

#[test]
fn text() {
    for n in [0, 1 << 21] {
        let fields = Fields {
            text_len: Some(n),
            ..good()
        };
        assert!(matches!(fields.error(), UndoError::Count { .. }), "{n}");
    }
    for bad in [&b"{}"[..], b"\xff\xff", br#"{"original":1}"#] {
        let fields = Fields {
            text: bad.to_vec(),
            ..good()
        };
        assert!(matches!(fields.error(), UndoError::Text { .. }), "{bad:?}");
    }
}

#[test]
fn part_lengths() {
    let mut fields = good();
    fields.original[0].0 = u64::MAX;
    assert!(matches!(fields.error(), UndoError::Length { .. }));
    // More than all merged bytes and the body can give.
    fields.original[0].0 = 1 << 40;
    assert!(matches!(fields.error(), UndoError::Length { .. }));
    let fields = Fields {
        merged_len: 1 << 63,
        ..good()
    };
    assert!(matches!(fields.error(), UndoError::Length { .. }));
}

#[test]
fn body_length() {
    for n in [0, 11, u64::MAX] {
        let fields = Fields {
            body_len: Some(n),
            ..good()
        };
        assert!(
            matches!(fields.error(), UndoError::FileLength { .. }),
            "{n}"
        );
    }
}

#[test]
fn own_digest() {
    let fields = Fields {
        digest: Some([1; 32]),
        ..good()
    };
    assert!(matches!(fields.error(), UndoError::Damaged { .. }));
}

#[test]
fn original_digest() {
    let mut fields = good();
    fields.original[0].1 = Digest([0; 32]).0.to_vec();
    assert!(matches!(fields.error(), UndoError::Rebuilt { part: 0, .. }));
}

#[test]
fn a_body_that_does_not_inflate() {
    let fields = Fields {
        body: vec![0; 40],
        deflate: false,
        ..good()
    };
    assert!(matches!(fields.body_error(), BodyError::Inflate(_)));
}

#[test]
fn a_body_that_ends_early() {
    assert!(matches!(body(&[]), BodyError::Inflate(_)));
    assert!(matches!(body(&[0, 0, 0, 5]), BodyError::Inflate(_)));
    assert!(matches!(body(&[2, 10, 1, 2]), BodyError::Inflate(_)));
}

#[test]
fn a_body_that_goes_on() {
    assert!(matches!(body(&[0, 0, 0, 10, 0]), BodyError::Trailing));
}

#[test]
fn block_kind() {
    assert!(matches!(body(&[3]), BodyError::Kind { found: 3 }));
}

#[test]
fn numbers_past_64_bits() {
    let long = [0xff; 10];
    assert!(matches!(
        body(&[&[0], &long[..]].concat()),
        BodyError::Number
    ));
    let eleven = [0x80; 11];
    assert!(matches!(
        body(&[&[0], &eleven[..]].concat()),
        BodyError::Number
    ));
}

#[test]
fn merged_part() {
    assert!(matches!(
        body(&[0, 1, 0, 10]),
        BodyError::Part { found: 1, max: 1 }
    ));
}

#[test]
fn merged_range() {
    assert!(matches!(body(&[0, 0, 91, 10]), BodyError::Range { .. }));
    // An offset that overflows with the length.
    let mut bytes = vec![0, 0];
    blocks::put_number(&mut bytes, u64::MAX);
    bytes.push(10);
    assert!(matches!(body(&bytes), BodyError::Range { .. }));
}

#[test]
fn block_lengths() {
    for kind in [&[0u8, 0, 0][..], &[1, 0, 0], &[2]] {
        for n in [0u64, 11, u64::MAX] {
            let mut bytes = kind.to_vec();
            blocks::put_number(&mut bytes, n);
            let e = body(&bytes);
            assert!(matches!(e, BodyError::BlockLength { .. }), "{e}");
        }
    }
}

#[test]
fn run_counts() {
    for n in [0u64, 11, u64::MAX] {
        let mut bytes = vec![1, 0, 0, 10];
        blocks::put_number(&mut bytes, n);
        assert!(matches!(body(&bytes), BodyError::Runs { max: 10, .. }));
    }
}

#[test]
fn runs() {
    for (gap, run) in [(0, 0), (10, 1), (0, 11), (u64::MAX, 1), (1, u64::MAX)] {
        let mut bytes = vec![1, 0, 0, 10, 1];
        blocks::put_number(&mut bytes, gap);
        blocks::put_number(&mut bytes, run);
        assert!(matches!(body(&bytes), BodyError::Run { left: 10, .. }));
    }
}
