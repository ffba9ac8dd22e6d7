//! Bounded forward reading of a header: no read and no allocation exceeds what the file holds.

use std::io::Read;
use std::path::Path;

use crate::gguf::value::MAX_ARRAY_DEPTH;
use crate::gguf::{Array, GgufError, MAX_HEADER_BYTES, MAX_KEY_LEN, RawString, Value, ValueType};

pub(crate) struct Cursor<'a, R> {
    pub path: &'a Path,
    /// Bytes read so far.
    pub pos: u64,
    pub file_len: u64,
    /// What is being read, for error messages.
    pub what: String,
    input: R,
}

impl<'a, R: Read> Cursor<'a, R> {
    pub fn new(path: &'a Path, file_len: u64, input: R) -> Self {
        Self {
            path,
            pos: 0,
            file_len,
            what: "the header".to_owned(),
            input,
        }
    }

    pub fn left(&self) -> u64 {
        self.file_len - self.pos
    }

    fn check(&self, wanted: u64) -> Result<(), GgufError> {
        if wanted > self.left() {
            return Err(GgufError::UnexpectedEnd {
                path: self.path.to_owned(),
                offset: self.pos,
                what: self.what.clone(),
                wanted,
                left: self.left(),
            });
        }
        self.check_limit(wanted)
    }

    fn check_limit(&self, wanted: u64) -> Result<(), GgufError> {
        if wanted > MAX_HEADER_BYTES - self.pos {
            return Err(GgufError::HeaderTooLarge {
                path: self.path.to_owned(),
                offset: self.pos,
                what: self.what.clone(),
                limit: MAX_HEADER_BYTES,
            });
        }
        Ok(())
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<(), GgufError> {
        self.input.read_exact(out).map_err(|source| GgufError::Io {
            path: self.path.to_owned(),
            doing: "reading the header",
            source,
        })?;
        self.pos += out.len() as u64;
        Ok(())
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        self.check(N as u64)?;
        let mut out = [0; N];
        self.fill(&mut out)?;
        Ok(out)
    }

    pub fn u32(&mut self) -> Result<u32, GgufError> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, GgufError> {
        self.array().map(u64::from_le_bytes)
    }

    /// `n` bytes; checks before it allocates.
    pub fn bytes(&mut self, n: u64) -> Result<Vec<u8>, GgufError> {
        self.check(n)?;
        let mut out = vec![0; n as usize]; // at most MAX_HEADER_BYTES
        self.fill(&mut out)?;
        Ok(out)
    }

    fn string(&mut self) -> Result<RawString, GgufError> {
        let offset = self.pos;
        let found = self.u64()?;
        if found > self.left() {
            return Err(GgufError::StringLength {
                path: self.path.to_owned(),
                what: self.what.clone(),
                offset,
                found,
                left: self.left(),
            });
        }
        self.bytes(found).map(RawString)
    }

    /// A metadata key: 1 to 65535 bytes of UTF-8 without NUL.
    pub fn key(&mut self) -> Result<String, GgufError> {
        let offset = self.pos;
        let found = self.u64()?;
        check_key_len(self.path, offset, found)?;
        let bytes = self.bytes(found)?;
        text(bytes).map_err(|found| GgufError::KeyText {
            path: self.path.to_owned(),
            offset,
            found,
        })
    }

    /// The type and value of `key`.
    pub fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        let offset = self.pos;
        let found = self.u32()?;
        let ty = ValueType::from_u32(found).ok_or_else(|| GgufError::ValueType {
            path: self.path.to_owned(),
            key: key.to_owned(),
            offset,
            found,
        })?;
        Ok(match ty {
            ValueType::U8 => Value::U8(u8::from_le_bytes(self.array()?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.array()?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array()?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array()?)),
            ValueType::U32 => Value::U32(self.u32()?),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array()?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array()?)),
            ValueType::U64 => Value::U64(self.u64()?),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array()?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array()?)),
            ValueType::Bool => Value::Bool(self.bools(key, 1)?[0]),
            ValueType::String => Value::String(self.string()?),
            ValueType::Array => Value::Array(self.array_value(key, 1)?),
        })
    }

    fn bools(&mut self, key: &str, n: u64) -> Result<Vec<bool>, GgufError> {
        let offset = self.pos;
        let bytes = self.bytes(n)?;
        let flag = |(i, &found): (usize, &u8)| match found {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(GgufError::BoolValue {
                path: self.path.to_owned(),
                key: key.to_owned(),
                offset: offset + i as u64,
                found,
            }),
        };
        bytes.iter().enumerate().map(flag).collect()
    }

    fn array_value(&mut self, key: &str, depth: usize) -> Result<Array, GgufError> {
        let offset = self.pos;
        if depth > MAX_ARRAY_DEPTH {
            return Err(GgufError::ArrayDepth {
                path: self.path.to_owned(),
                key: key.to_owned(),
                offset,
                max: MAX_ARRAY_DEPTH,
            });
        }
        let found = self.u32()?;
        let ty = ValueType::from_u32(found).ok_or_else(|| GgufError::ArrayType {
            path: self.path.to_owned(),
            key: key.to_owned(),
            offset,
            found,
        })?;
        let offset = self.pos;
        let n = self.u64()?;
        let max = self.left() / ty.min_bytes();
        if n > max {
            return Err(GgufError::ArrayLength {
                path: self.path.to_owned(),
                key: key.to_owned(),
                offset,
                found: n,
                max,
            });
        }
        self.check_limit(n * ty.min_bytes())?;
        Ok(match ty {
            ValueType::U8 => Array::U8(self.bytes(n)?),
            ValueType::I8 => Array::I8(self.numbers(n, i8::from_le_bytes)?),
            ValueType::U16 => Array::U16(self.numbers(n, u16::from_le_bytes)?),
            ValueType::I16 => Array::I16(self.numbers(n, i16::from_le_bytes)?),
            ValueType::U32 => Array::U32(self.numbers(n, u32::from_le_bytes)?),
            ValueType::I32 => Array::I32(self.numbers(n, i32::from_le_bytes)?),
            ValueType::F32 => Array::F32(self.numbers(n, f32::from_le_bytes)?),
            ValueType::U64 => Array::U64(self.numbers(n, u64::from_le_bytes)?),
            ValueType::I64 => Array::I64(self.numbers(n, i64::from_le_bytes)?),
            ValueType::F64 => Array::F64(self.numbers(n, f64::from_le_bytes)?),
            ValueType::Bool => Array::Bool(self.bools(key, n)?),
            // no capacity up front: memory grows with the bytes actually read
            ValueType::String => {
                Array::String((0..n).map(|_| self.string()).collect::<Result<_, _>>()?)
            }
            ValueType::Array => Array::Array(
                (0..n)
                    .map(|_| self.array_value(key, depth + 1))
                    .collect::<Result<_, _>>()?,
            ),
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        n: u64,
        from: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        let bytes = self.bytes(n * N as u64)?;
        let (chunks, _) = bytes.as_chunks::<N>();
        Ok(chunks.iter().map(|&chunk| from(chunk)).collect())
    }
}

pub(crate) fn check_key_len(path: &Path, offset: u64, found: u64) -> Result<(), GgufError> {
    if (1..=MAX_KEY_LEN).contains(&found) {
        return Ok(());
    }
    Err(GgufError::KeyLength {
        path: path.to_owned(),
        offset,
        found,
    })
}

/// UTF-8 without NUL, or the bytes back. llama.cpp reads names as C strings, so a NUL would make
/// it see another name than we do.
pub(crate) fn text(bytes: Vec<u8>) -> Result<String, Vec<u8>> {
    if bytes.contains(&0) {
        return Err(bytes);
    }
    String::from_utf8(bytes).map_err(|e| e.into_bytes())
}
