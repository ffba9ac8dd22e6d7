//! Which layers are adapted.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// Layers by number, from 0: `8-15,20`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Layers(Vec<RangeInclusive<usize>>);

impl Layers {
    /// Whether layer `n` is one of them.
    pub fn has(&self, n: usize) -> bool {
        self.0.iter().any(|r| r.contains(&n))
    }

    /// The highest.
    pub fn last(&self) -> usize {
        self.0.iter().map(|r| *r.end()).max().unwrap_or(0)
    }
}

impl FromStr for Layers {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("wanted layers such as 8-15,20, found {s:?}");
        let one = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |n: &str| n.trim().parse::<usize>().map_err(|_| bad());
            let range = number(first)?..=number(last)?;
            if range.is_empty() {
                Err(bad())
            } else {
                Ok(range)
            }
        };
        Ok(Self(s.split(',').map(one).collect::<Result<_, _>>()?))
    }
}

impl TryFrom<String> for Layers {
    type Error = String;

    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

impl From<Layers> for String {
    fn from(layers: Layers) -> Self {
        layers.to_string()
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, r) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            match r.start() == r.end() {
                true => write!(f, "{comma}{}", r.start())?,
                false => write!(f, "{comma}{}-{}", r.start(), r.end())?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_single_layers() {
        let layers: Layers = "2-4, 7".parse().expect("layers");
        let has: Vec<usize> = (0..10).filter(|&n| layers.has(n)).collect();
        assert_eq!((has, layers.last()), (vec![2, 3, 4, 7], 7));
        assert_eq!(layers.to_string(), "2-4,7");
        for bad in ["", "-", "3-2", "1,", "a", "1-2-3", "-1"] {
            let error = bad.parse::<Layers>().expect_err(bad);
            assert!(error.contains("8-15,20"), "{error}");
        }
    }
}
