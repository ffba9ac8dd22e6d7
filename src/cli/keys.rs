//! `nepenthe keygen` and `nepenthe sign`.

use crate::error::Error;
use crate::trust::{Password, keygen, sign};
use clap::Args;
use std::path::PathBuf;

/// Make a pair of keys to sign patches with, in minisign's form
#[derive(Debug, Args)]
pub struct Keygen {
    /// Where they go: NAME.key, to be kept secret, and NAME.pub
    #[arg(short, long, value_name = "NAME")]
    out: PathBuf,
    /// Do not protect the secret key with a password
    #[arg(long)]
    no_password: bool,
}

impl Keygen {
    pub(super) fn run(&self) -> Result<(), Error> {
        let with = |end: &str| {
            let mut name = self.out.as_os_str().to_owned();
            name.push(end);
            PathBuf::from(name)
        };
        let password = match self.no_password {
            true => Password::None,
            false => Password::Ask,
        };
        let (secret, public) = (with(".key"), with(".pub"));
        let key = keygen(&secret, &public, password)?;
        eprintln!(
            "{}: secret; {}: public:",
            secret.display(),
            public.display()
        );
        println!("{}", key.text());
        Ok(())
    }
}

/// Sign patches; the signature goes beside each, as FILE.minisig
#[derive(Debug, Args)]
pub struct Sign {
    /// The patches
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Secret key
    #[arg(short, long, value_name = "NAME.key")]
    key: PathBuf,
    /// Number that a patch store compares, larger for every later patch
    #[arg(long, value_name = "N")]
    sequence: Option<u64>,
    /// Replace signatures that exist
    #[arg(long)]
    force: bool,
}

impl Sign {
    pub(super) fn run(&self) -> Result<(), Error> {
        for file in &self.files {
            let signature = sign(file, &self.key, Password::Ask, self.sequence, self.force)?;
            eprintln!("{}", signature.display());
        }
        Ok(())
    }
}
